"""Keeps Marvin's conversations in memory: stock Marvin writes every prompt and answer in clear to SQLite."""

from datetime import datetime
from typing import Any

from marvin.engine import orchestrator
from marvin.thread import Message, Thread


class MemoryThread(Thread):
    """One conversation, gone when it is over."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[Message] = []

    async def _ensure_thread_exists(self) -> None:
        pass

    async def add_messages_async(self, messages: list[Any]) -> list[Message]:
        new = [Message(thread_id=self.id, message=message) for message in messages]
        self._messages += new
        return new

    async def get_messages_async(
        self,
        before: datetime | None = None,  # noqa: ARG002
        after: datetime | None = None,  # noqa: ARG002
        limit: int | None = None,
        include_system_messages: bool = False,
    ) -> list[Message]:
        messages = [m for m in self._messages if include_system_messages or not _is_system(m)]
        return messages[-limit:] if limit else messages


class _NoRecord:
    @staticmethod
    async def create(**_: Any) -> None:
        pass


orchestrator.DBLLMCall = _NoRecord  # type: ignore[attr-defined]  # it writes a row per call, for any kind of thread


def _is_system(message: Message) -> bool:
    return any(part.part_kind == "system-prompt" for part in message.message.parts)
