"""Lanes with limits, batches, flights, cursors; the columns of a run that these and recovery need."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
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
        served         bigint not null default 0                     -- the owner key that was served last
    ) with (fillfactor = 50);

    create table batches (
        id           uuid primary key,
        owner        text not null,
        idem_key     text,
        request_hash bytea not null,
        size         integer not null,
        created_at   timestamptz not null default now()
    );
    create unique index batches_idempotency on batches (owner, idem_key) where idem_key is not null;

    -- Single flight: the run that computes the value of this cache key for all others.
    create table flights (
        key      text primary key,
        run_id   uuid not null,
        fence    bigint not null,
        taken_at timestamptz not null default now()
    );

    alter table runs
        add column batch_id uuid,
        add column promoted boolean not null default false,  -- counted in its lane; only when queued, running or ended
        add column prefetched boolean not null default false,  -- claimed before a slot was free for it
        add column lost_fence bigint,                        -- the latest attempt that was lost with its worker
        add column flight text;                              -- the flight it waits for, while scheduled
    create index runs_following on runs (flight) where flight is not null and state = 'scheduled';
    create index runs_held on runs (lane, owner_key, priority desc, run_at, id) where state = 'held';
    create index runs_deadline on runs (deadline)
        where deadline is not null and state in ('held', 'scheduled', 'queued');
    -- With runs_ready: the waiting runs of an owner, which are counted when it nears its limit.
    create index runs_waiting on runs (owner_key) where state in ('held', 'scheduled');
    create index runs_by_state on runs (state, id);
    create index runs_in_batch on runs (batch_id, id) where batch_id is not null;

    alter table task_types
        add column lane text,
        add column history boolean not null default true;  -- whether Prefect shows its runs
    -- Runs that the worker has settled: the wait of a backlog is estimated from them.
    alter table workers add column settled bigint not null default 0;

    -- How far the steward has come, so that the next one continues from there; `leader` is the one that leads.
    create table cursors (
        name     text primary key,
        value    uuid not null,
        moved_at timestamptz not null default now()
    ) with (fillfactor = 50);
    drop index runs_ended_badly;
    create index runs_ended_badly on runs (finished_at) where state in ('failed', 'cancelled', 'expired');

    create or replace view backlog as
        select t.pool,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'queued') as ready,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'running') as running,
               (select coalesce(extract(epoch from now() - min(r.run_at)), 0)::float8 from runs r
                 where r.pool = t.pool and r.state = 'queued') as oldest_age_seconds
          from (select distinct pool from task_types) t;
    """)
