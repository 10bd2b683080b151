"""Runs, workers and task types.

Migrations expand, then contract: the code of the release before must run on every schema; there are no downgrades.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    create table task_types (
        name          text primary key,
        pool          text not null,
        version       text not null,
        description   text not null,
        input_schema  json not null,
        output_schema json not null,
        retries       integer not null,
        timeout       interval,
        max_attempts  integer not null,
        updated_at    timestamptz not null default now()
    );

    create table workers (
        id           uuid primary key,
        pool         text not null,
        host         text not null,
        version      text not null,
        tasks        text[] not null,
        slots        integer not null,
        busy         integer not null default 0,
        draining     boolean not null default false,
        started_at   timestamptz not null default now(),
        heartbeat_at timestamptz not null default now()
    ) with (fillfactor = 50);  -- one update a second each: HOT, because no index has a column that changes

    create table runs (
        id            uuid primary key,
        task          text not null,
        pool          text not null,
        owner         text not null,
        -- the order in which claims go round the owners: evenly spread, and of one width for every name
        owner_key     bigint not null generated always as (hashtextextended(owner, 0)) stored,
        lane          text,
        priority      smallint not null default 0,
        state         text not null check (state in
                      ('held', 'scheduled', 'queued', 'running', 'completed', 'failed', 'cancelled', 'expired')),
        run_at        timestamptz not null default now(),
        deadline      timestamptz,
        fence         bigint not null default 0,
        attempts_used integer not null default 0,
        retries_used  integer not null default 0,
        max_attempts  integer not null,
        worker_id     uuid,
        cancel_requested_at timestamptz,
        idem_key      text,
        request_hash  bytea,
        -- JSON as text: jsonb refuses the escape of NUL, and no statement reads inside it
        input         text,
        input_key     text,
        result        text,
        result_key    text,
        error         json,
        usage         json,
        progress      json,
        metadata      json not null,
        created_at    timestamptz not null default now(),
        started_at    timestamptz,
        finished_at   timestamptz,
        constraint input_is_in_one_place check (num_nonnulls(input, input_key) = 1),
        constraint running_has_a_worker check (state <> 'running' or worker_id is not null),
        constraint completed_means_stored check ((state = 'completed') = (result_key is not null)),
        constraint final_means_finished
            check ((state in ('completed', 'failed', 'cancelled', 'expired')) = (finished_at is not null))
    );
    create index runs_ready on runs (pool, owner_key, priority desc, run_at, id) where state = 'queued';
    create index runs_scheduled on runs (run_at) where state = 'scheduled';
    create index runs_live on runs (worker_id) where state = 'running';
    create unique index runs_idempotency on runs (owner, idem_key) where idem_key is not null;
    create index runs_by_owner on runs (owner, id);
    create index runs_ended_badly on runs (finished_at) where state in ('failed', 'cancelled');

    create view backlog as
        select t.pool,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'queued') as ready,
               (select count(*) from runs r join workers w on w.id = r.worker_id
                 where w.pool = t.pool and r.state = 'running') as running,
               (select coalesce(extract(epoch from now() - min(r.run_at)), 0)::float8 from runs r
                 where r.pool = t.pool and r.state = 'queued') as oldest_age_seconds
          from (select distinct pool from task_types) t;
    """)
