"""Starts the command line as `python -m pipeline`; the shebang of jobs/*.yaml comes through here too."""

import sys

from pipeline.cli import main

sys.exit(main())
