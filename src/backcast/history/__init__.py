"""The history of runs in Prefect: published as it happens, and reconciled with the ledger afterwards."""
