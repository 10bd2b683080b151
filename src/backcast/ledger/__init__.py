"""The ledger: every SQL statement of the product. One module per decision about runs; `migrations/` is the schema.

Correctness rests on PostgreSQL alone (row locks, partial indexes, the database's clock), never on a process being alive
or on time.
"""
