"""The command line: ``python -m llmkern``, or ``llmkern``.

Each command is one module here; what is slow to import (torch, matplotlib) is imported by the command that needs it.
"""

from __future__ import annotations

import typer

from .bench import bench
from .demo import demo, peak
from .info import info

app = typer.Typer(help="Fused kernels for PyTorch.", no_args_is_help=True, add_completion=False)
app.command()(info)
app.command()(demo)
app.add_typer(bench, name="bench")
app.command(name="demo-peak", hidden=True)(peak)
