"""`backcast up`: the whole product as processes on one machine, with a database and a model of its own."""
