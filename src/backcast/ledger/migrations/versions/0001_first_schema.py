"""The first schema.

Migrations after this one expand, then contract: the code of the release before must run on every schema; there are no
downgrades.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# What a run is, in both of its homes. JSON is kept as text: jsonb refuses the escape of NUL, for which statements that
# read inside of it have to look first.
_RUN = """
        id            uuid not null,                 -- version 7: in the order of time
        task          text not null,
        pool          text not null,
        owner         text not null,
        lane          text,
        batch_id      uuid,
        retry_of      uuid,                          -- the ended run that it repeats
        priority      smallint not null,
        state         text not null,
        run_at        timestamptz not null,
        deadline      timestamptz,
        fence         bigint not null,               -- the number of its attempt: each claim raises it
        attempts_used integer not null,
        retries_used  integer not null,
        max_attempts  integer not null,
        worker_id     uuid,
        lost_fence    bigint,                        -- the latest attempt that was lost with its worker
        cancel_requested_at timestamptz,
        signature     text not null,                 -- of the task's version that accepted the input
        input         text,
        input_key     text,
        error         json,
        usage         json,
        progress      json,                          -- as its task has reported it last
        attempts      json,                          -- the newest that did not succeed: see ledger/attempts.py
        metadata      json not null,
        created_at    timestamptz not null default now(),
        started_at    timestamptz,
        check (num_nonnulls(input, input_key) = 1)"""


def upgrade() -> None:
    op.execute(f"""
    -- Runs that are not over. They are few beside those that are, and every index is small: so a vacuum is short.
    create table runs ({_RUN},
        primary key (id),
        -- the order in which claims go round the owners: evenly spread, and of one width for every name
        owner_key     bigint not null generated always as (hashtextextended(owner, 0)) stored,
        promoted      boolean not null default false,  -- counted in its lane; only when queued or running
        prefetched    boolean not null default false,  -- claimed before a slot was free for it
        flight        text,                            -- the flight it waits for, while scheduled
        route         text not null default '',        -- '' for any worker of the pool, or what its worker must have
        parked_at     timestamptz,                     -- since when its route leads nowhere
        trace         text,                            -- the traceparent of the request that made it
        constraint runs_are_not_over check (state in ('paused', 'held', 'scheduled', 'queued', 'running')),
        constraint running_has_a_worker check (state <> 'running' or worker_id is not null)
    -- The steward vacuums it when 5000 rows are dead. While no steward leads, autovacuum does: by a count, not a share
    -- of the table, and at full speed. No file is cut: all others would have to wait for that.
    ) with (autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0,
            vacuum_truncate = off);
    alter table runs
        alter priority set default 0, alter run_at set default now(), alter fence set default 0,
        alter attempts_used set default 0, alter retries_used set default 0, alter signature set default '';
    create index runs_ready on runs (pool, route, owner_key, priority desc, run_at, id) where state = 'queued';
    create index runs_scheduled on runs (run_at) where route = '' and state = 'scheduled';
    create index runs_live on runs (worker_id) where state = 'running';
    create index runs_held on runs (lane, owner_key, priority desc, run_at, id) where state = 'held';
    create index runs_following on runs (flight) where flight is not null and state = 'scheduled';
    create index runs_deadline on runs (deadline)
        where deadline is not null and state in ('paused', 'held', 'scheduled', 'queued');
    -- With runs_ready: the waiting runs of an owner, which are counted when it nears its limit.
    create index runs_waiting on runs (owner_key) where state in ('paused', 'held', 'scheduled');
    create index runs_in_lane on runs (lane, state) where lane is not null;
    -- Empty as long as every worker of a pool can do all of its runs.
    create index runs_routed on runs (pool, route, state) where route <> '' and state in ('queued', 'scheduled');
    create index runs_parked on runs (parked_at) where route <> '' and state = 'scheduled';
    create index runs_by_owner on runs (owner, id);
    create index runs_by_state on runs (state, id);
    create index runs_in_batch on runs (batch_id, id) where batch_id is not null;

    -- Runs that are over: written once and never changed. The statement that ends a run moves it here. By the day of
    -- the id, and the completed apart, because they may be kept for less long: retention drops whole partitions.
    create table ended ({_RUN},
        result        text,
        result_key    text,
        finished_at   timestamptz not null default now(),
        primary key (id, state),
        constraint ended_are_over check (state in ('completed', 'failed', 'cancelled', 'expired')),
        constraint completed_means_stored check ((state = 'completed') = (result_key is not null))
    ) partition by list (state);
    create index ended_by_owner on ended (owner, id);
    create index ended_in_batch on ended (batch_id, id) where batch_id is not null;
    create table ended_completed partition of ended for values in ('completed') partition by range (id);
    create table ended_otherwise partition of ended for values in ('failed', 'cancelled', 'expired')
        partition by range (id);
    create index ended_by_state on ended_otherwise (state, id);
    create index ended_badly on ended_otherwise (finished_at);
    -- Those that ended more than a day after the day of their id: few, and no partition has to stay for them. Also
    -- those with an id of a clock that was far ahead.
    create table ended_late (like ended including defaults including constraints, primary key (id));
    create index ended_late_by_owner on ended_late (owner, id);
    create index ended_late_in_batch on ended_late (batch_id, id) where batch_id is not null;
    create index ended_late_finished on ended_late (finished_at);

    -- Both homes, for everybody who reads runs without regard to where they are.
    create view all_runs as
        select id, task, pool, owner, lane, batch_id, retry_of, priority, state, run_at, deadline, fence, attempts_used,
               retries_used, max_attempts, worker_id, lost_fence, cancel_requested_at, signature, input, input_key,
               error, usage, progress, attempts, metadata, created_at, started_at, null::text as result,
               null::text as result_key, null::timestamptz as finished_at from runs
        union all
        select id, task, pool, owner, lane, batch_id, retry_of, priority, state, run_at, deadline, fence, attempts_used,
               retries_used, max_attempts, worker_id, lost_fence, cancel_requested_at, signature, input, input_key,
               error, usage, progress, attempts, metadata, created_at, started_at, result, result_key, finished_at
          from ended
        union all
        select id, task, pool, owner, lane, batch_id, retry_of, priority, state, run_at, deadline, fence, attempts_used,
               retries_used, max_attempts, worker_id, lost_fence, cancel_requested_at, signature, input, input_key,
               error, usage, progress, attempts, metadata, created_at, started_at, result, result_key, finished_at
          from ended_late;

    -- The lowest id of a day, in UTC: the first 48 bits of an id are its milliseconds since 1970.
    create function first_id(day date) returns uuid language sql immutable strict parallel safe return
        (lpad(to_hex((day - date '1970-01-01') * 86400000::bigint), 12, '0') || repeat('0', 20))::uuid;

    -- Whether statements can read inside of this JSON. An escaped null character, or half a pair of surrogates, makes
    -- them fail.
    create function is_readable(value json) returns boolean language plpgsql immutable strict as $$
    begin
        return value::jsonb is not null;
    exception when others then
        return false;
    end $$;

    -- Makes the partitions of these days that are missing, with the rights of the owner, for parts that may change no
    -- table. `attach` lets others read and write meanwhile; a second caller waits for the first.
    create function make_partitions(first_day date, last_day date) returns void language plpgsql security definer
        set search_path = backcast, pg_temp set lock_timeout = '2s' as $$
    declare day date; home text; name text;
    begin
        perform pg_advisory_xact_lock(hashtext('backcast.partitions'));
        for day in select first_day + n from generate_series(0, last_day - first_day) n loop
            foreach home in array array['ended_completed', 'ended_otherwise'] loop
                name := home || '_' || to_char(day, 'YYYYMMDD');
                continue when exists (select from pg_class where oid = to_regclass(name) and relispartition);
                -- Rows are frozen by the first vacuum that sees them: none has to read a day that is over again.
                execute format('create table %I (like %I including all) with (autovacuum_freeze_min_age = 0)',
                               name, home);
                execute format('alter table %I attach partition %I for values from (%L) to (%L)',
                               home, name, first_id(day), first_id(day + 1));
            end loop;
        end loop;
    end $$;

    -- Takes a partition away from its table, and removes it. In two steps: `detach` locks the whole table, for an
    -- instant; to remove a large file takes longer, and locks nobody out. What an administrator detaches is not
    -- renamed, and stays.
    create function retire_partition(name text) returns void language plpgsql security definer
        set search_path = backcast, pg_temp set lock_timeout = '500ms' as $$
    declare home regclass; id oid := to_regclass(quote_ident(name));
    begin
        perform pg_advisory_xact_lock(hashtext('backcast.partitions'));
        for home in select inhparent::regclass from pg_inherits where inhrelid = id
                       and inhparent in ('ended_completed'::regclass, 'ended_otherwise'::regclass) loop
            execute format('alter table %s detach partition %I', home, name);
            execute format('alter table %I rename to %I', name, 'retired_' || id);
        end loop;
    end $$;
    create function drop_retired() returns void language plpgsql security definer
        set search_path = backcast, pg_temp set lock_timeout = '2s' as $$
    declare name text;
    begin
        perform pg_advisory_xact_lock(hashtext('backcast.partitions'));
        for name in select relname from pg_class where relnamespace = 'backcast'::regnamespace and relkind = 'r'
                       and not relispartition and relname ~ '^retired_[0-9]+$' loop
            execute format('drop table %I', name);
        end loop;
    end $$;
    revoke all on function make_partitions(date, date), retire_partition(text), drop_retired() from public;

    -- What runs have emitted while they ran. A run that emits nothing has none.
    create table events (
        run_id  uuid not null,
        attempt integer not null,  -- it never falls with the fence; retries that are made at once share a fence
        fence   bigint not null,
        seq     integer not null,  -- within its fence
        at      timestamptz not null,
        kind    text not null,
        data    json not null,
        primary key (run_id, attempt, fence, seq)
    );

    -- What a request's Idempotency-Key has made.
    create table idempotency_keys (
        owner        text not null,
        key          text not null,
        run_id       uuid not null,
        request_hash bytea not null,
        created_at   timestamptz not null default now(),
        primary key (owner, key)
    );
    create index idempotency_keys_by_age on idempotency_keys (created_at, owner, key);

    -- The runs that repeat an ended one, which never changes itself: written with the new run, by the same statement.
    create table retries (
        run_id   uuid not null,
        retry_id uuid not null,
        primary key (run_id, retry_id)
    );

    create table batches (
        id           uuid primary key,
        owner        text not null,
        idem_key     text,
        request_hash bytea not null,
        size         integer not null,
        skipped      integer not null default 0,  -- wrong lines, if it was to go on without them
        errors       text,                        -- of the first ones, in JSON Lines
        created_at   timestamptz not null default now()
    );
    create unique index batches_idempotency on batches (owner, idem_key) where idem_key is not null;

    -- What is to be done with many runs, and how far the steward has come.
    create table operations (
        id           uuid primary key,
        kind         text not null check (kind in ('retry', 'cancel')),
        owner        text not null,                 -- of its idempotency key
        idem_key     text,
        request_hash bytea not null,
        filter       json not null,
        batch_id     uuid,                          -- of the runs that it makes
        until        uuid not null,                 -- the last id that it looks at
        cursor       uuid not null default '00000000-0000-0000-0000-000000000000',
        state        text not null default 'running' check (state in ('running', 'completed', 'cancelled')),
        done         integer not null default 0,
        skipped      integer not null default 0,
        failed       integer not null default 0,
        created_at   timestamptz not null default now(),
        finished_at  timestamptz
    ) with (fillfactor = 50);
    create unique index operations_idempotency on operations (owner, idem_key) where idem_key is not null;
    create index operations_running on operations (id) where state = 'running';

    create table workers (
        id           uuid primary key,
        pool         text not null,
        host         text not null,
        version      text not null,
        tasks        text[] not null,
        routes       text[] not null default '{{}}',  -- those that lead to this worker
        slots        integer not null,
        busy         integer not null default 0,
        draining     boolean not null default false,
        settled      bigint not null default 0,     -- runs: the wait of a backlog is estimated from them
        recent       float8 not null default 0,     -- of them: see ledger/pace.py
        drain_asked_at timestamptz,
        started_at   timestamptz not null default now(),
        heartbeat_at timestamptz not null default now()
    ) with (fillfactor = 50);  -- one update a second each: HOT, because no index has a column that changes

    create table task_types (
        name          text not null,
        pool          text not null,
        signature     text not null default '',
        version       text not null,
        description   text not null,
        input_schema  json not null,
        output_schema json not null,
        retries       integer not null,
        timeout       interval,
        max_attempts  integer not null,
        lane          text,
        history       boolean not null default true,  -- whether Prefect shows its runs
        seen_at       timestamptz not null default now(),
        registered_at timestamptz not null default now(),
        primary key (name, pool, signature)
    );

    -- A row stays when its limits are lifted, so that the runs it counts can still be subtracted.
    create table lanes (
        name           text primary key,
        max_running    integer check (max_running >= 0),             -- none: as many as there are slots
        max_per_minute double precision check (max_per_minute > 0),  -- none: as often as they come
        limited        boolean not null generated always as (num_nonnulls(max_running, max_per_minute) > 0) stored,
        -- Its `promoted` runs that are queued or running. No check that it is not negative: an update that is about to
        -- wait for another one computes with the old number first, and would fail.
        promoted       integer not null default 0,
        tokens         double precision not null default 1,
        refilled_at    timestamptz not null default now(),
        served         bigint not null default 0,                    -- the owner key that was served last
        recent         float8 not null default 0                     -- promotions: see ledger/pace.py
    ) with (fillfactor = 50);

    -- Nothing new of these starts. A row stays for a minute after its end: see `pauses`.
    create table pauses (
        kind     text not null check (kind in ('task', 'lane', 'pool')),
        name     text not null,
        reason   text not null,
        by       text not null,
        since    timestamptz not null default now(),
        until    timestamptz,
        release  boolean not null,                -- whether running runs are released as well
        complete boolean not null default false,  -- whether all runs that were queued have been set aside
        primary key (kind, name)
    );

    -- Single flight: the run that computes the value of this cache key for all others.
    create table flights (
        key      text primary key,
        run_id   uuid not null,
        fence    bigint not null,
        taken_at timestamptz not null default now()
    );

    -- How far the steward has come, so that the next one continues from there; `leader` is the one that leads.
    create table cursors (
        name     text primary key,
        value    uuid not null,
        moved_at timestamptz not null default now()
    ) with (fillfactor = 50);

    -- A pool whose runs wait for a worker that can do them keeps one worker, or none would come when it is deployed.
    create view backlog as
        select t.pool,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'queued')
             + (exists (select from runs r where r.pool = t.pool and r.route <> '' and r.state = 'scheduled'))::int
               as ready,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'running') as running,
               (select coalesce(extract(epoch from now() - min(r.run_at)), 0)::float8 from runs r
                 where r.pool = t.pool and r.state = 'queued' and isfinite(r.run_at)) as oldest_age_seconds
          from (select distinct pool from task_types) t;
    """)  # noqa: S608  # a constant
    op.execute("select make_partitions(current_date - 8, current_date + 14)")
