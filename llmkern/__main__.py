"""``python -m llmkern``: info, demo, bench."""

from .cli import app

app(prog_name="python -m llmkern")
