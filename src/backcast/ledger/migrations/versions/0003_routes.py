"""Routes: runs go to the workers that can do them; several versions of a task at the same time.

Nothing has been released before: `task_types` gets another primary key, with which older workers can't register.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    alter table runs
        add column route     text not null default '',  -- '' for any worker of the pool, or what its worker must have
        add column signature text not null default '',  -- of the task's version that accepted the input
        add column parked_at timestamptz;               -- since when its route leads nowhere
    drop index runs_ready;
    create index runs_ready on runs (pool, route, owner_key, priority desc, run_at, id) where state = 'queued';
    -- Empty as long as every worker of a pool can do all of its runs.
    create index runs_routed on runs (pool, route, state) where route <> '' and state in ('queued', 'scheduled');
    create index runs_parked on runs (parked_at) where route <> '' and state = 'scheduled';
    drop index runs_scheduled;
    create index runs_scheduled on runs (run_at) where route = '' and state = 'scheduled';

    alter table workers add column routes text[] not null default '{}';  -- the routes that lead to this worker
    alter table task_types add column signature text not null default '';
    alter table task_types add column registered_at timestamptz not null default now();
    alter table task_types rename column updated_at to seen_at;
    alter table task_types drop constraint task_types_pkey, add primary key (name, pool, signature);

    -- A pool whose runs wait for a worker that can do them keeps one worker, or none would come when it is deployed.
    create or replace view backlog as
        select t.pool,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'queued')
             + (exists (select from runs r where r.pool = t.pool and r.route <> '' and r.state = 'scheduled'))::int
               as ready,
               (select count(*) from runs r where r.pool = t.pool and r.state = 'running') as running,
               (select coalesce(extract(epoch from now() - min(r.run_at)), 0)::float8 from runs r
                 where r.pool = t.pool and r.state = 'queued') as oldest_age_seconds
          from (select distinct pool from task_types) t;
    """)
