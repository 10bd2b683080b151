"""HTTP: one router per noun. Routes declare, call and return; errors become problem documents in one place."""
