from backcast.cli.main import app

app()
