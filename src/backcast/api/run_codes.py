"""The error codes of runs that backcast itself gives, each with its title and what to do. Tasks may add their own."""

RUN_CODES = {
    "blocked_worker": (
        "The run has blocked the process that executed it",
        "The event loop stood still for BACKCAST_WORKER__STALL; the detail shows where. Use `await` or a sync task.",
    ),
    "cancelled": ("The run was cancelled", "Its caller, or the caller of its batch, asked for that."),
    "executor_died": (
        "The process that executed the run has ended",
        "Code of the task, or of a library, has ended it: the detail has the signal or the exit code, and where.",
    ),
    "executor_disturbed": (
        "The run's own asyncio task was cancelled",
        "Code of the task cancels what it finds on the event loop, or its exception can't be read. Mend the task.",
    ),
    "expired": (
        "The deadline passed while the run waited",
        "It was not running when its deadline came. Submit it with a later one, or see why the queue is long.",
    ),
    "input_lost": ("The stored input is gone", "Its object is no longer in the store. Submit the run again."),
    "input_too_long": ("The data is too long for the model", "Cut or split the data, or use a model that reads more."),
    "instructions_missing": (
        "A cast to text needs instructions",
        "Describe the text that you want in `instructions`; without it any text would be right.",
    ),
    "internal_error": ("Something went wrong on our side", "A bug of ours. The log of the worker has the details."),
    "invalid_input": (
        "The input does not fit the task",
        "A parameter is missing, unknown or of the wrong type; the detail names it; the task may have changed since.",
    ),
    "invalid_result": (
        "The result does not fit the type that the client was given",
        "Seen by the client only: the run has completed. Give the type that the target was made from.",
    ),
    "invalid_target": ("The target is not a shape that can be cast to", "The detail says what is wrong with it."),
    "model_answer_invalid": (
        "The model's answer does not fit the target",
        "It was asked again and did not mend it. Give instructions, simplify the target, or use a larger model.",
    ),
    "model_answer_too_long": (
        "The model's answer was cut off",
        "It had more to say than it may. Raise BACKCAST_MODEL__MAX_TOKENS, or ask for less.",
    ),
    "model_failed": ("Asking the model failed", "For a reason that may pass; the worker's log has it."),
    "model_not_connected": ("No model is connected", "Code of yours cast without `backcast.llm.connect`."),
    "model_not_set_up": ("No model is set up", "Set BACKCAST_MODEL__API_KEY, or serve the embedded model."),
    "model_overloaded": ("The model is overloaded", "The provider answered 429 until the retries were used up."),
    "model_quota": ("The provider's quota is used up", "Check its plan and billing."),
    "model_refused_input": (
        "The model refused to work on this input",
        "Its provider filters content. Change the data.",
    ),
    "model_refused_key": ("The provider refuses the key", "Check BACKCAST_MODEL__API_KEY."),
    "model_refused_request": (
        "The provider refuses the request",
        "The detail has its reason; often the target's shape.",
    ),
    "model_timeout": ("The model did not answer in time", "Raise BACKCAST_MODEL__TIMEOUT, or send less data."),
    "model_unavailable": ("The model can't be reached", "Its server was away until the retries were used up."),
    "model_unknown": (
        "The provider does not know the model",
        "Check BACKCAST_MODEL__NAME and BACKCAST_MODEL__BASE_URL.",
    ),
    "model_unreachable": (
        "The model's address can't be right",
        "Check BACKCAST_MODEL__BASE_URL; the detail has the reason.",
    ),
    "model_unusable": ("The model can't be used", "The installed versions or the answers do not fit; see the detail."),
    "out_of_memory": (
        "The process that executed the run took too much memory",
        "Work on less at a time, or raise BACKCAST_WORKER__MAX_MEMORY.",
    ),
    "released_too_often": (
        "The run was begun again and again, and never came to its end",
        "Its workers were stopped a hundred times before it was done: raise BACKCAST_WORKER__GRACE, or cut the task.",
    ),
    "result_too_large": ("The result is too large", "Return less, store it elsewhere, or raise BACKCAST_MAX_RESULT."),
    "same_value": (
        "Another run computes the same value",
        "Seen while the run waits for that one; it goes on by itself.",
    ),
    "signalled_worker": (
        "The run has sent a signal to its worker",
        "Code of the task signals its parent process. Send signals only to processes that the task has started.",
    ),
    "task_failed": ("The task failed", "Its code raised an error, which the detail quotes."),
    "temporarily_failed": ("The task failed for a reason that may pass", "It was retried as often as the task allows."),
    "timeout": ("The task took longer than it may", "Raise the task's `timeout_seconds`, or give it less to do."),
    "unfit_input": (
        "No worker has a version of the task that accepts this input",
        "Another version accepted it. The run waits for such a one, then fails: submit it again in the present form.",
    ),
    "unknown_task": (
        "No worker has the task",
        "The run waits for one, and fails after BACKCAST_UNKNOWN_AFTER: deploy a worker that has it, submit it again.",
    ),
    "unreadable_error": ("The recorded error can't be read", "The detail has its beginning, as it was recorded."),
    "unreadable_input": (
        "The stored input can't be read",
        "Its object is not the JSON that was stored. Submit it again.",
    ),
    "unserialisable_result": ("The result is not plain JSON", "Return values that JSON has, or a pydantic model."),
    "unstorable_outcome": (
        "The outcome can't be recorded",
        "The database refuses a value in it; the detail has its reason.",
    ),
    "unusable_row": (
        "The run's record can't be used",
        "It holds values that no worker can work with, so it was set aside. Submit the run again.",
    ),
    "unusable_input": ("The task can't work on this input", "The task itself refuses it; the detail has its reason."),
    "worker_lost": (
        "The run was lost with its worker, as often as it may be",
        "Mostly for want of memory: see the worker's end, and raise its limit or lower its slots.",
    ),
}
