from backcast.cli import app

app()
