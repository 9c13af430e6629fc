"""The command line: thin over tasks, experiments and diagnostics."""

import sys


def main() -> None:
    """Run the `regdrop` command; say what is missing where the extras are not installed."""
    try:
        from regdrop.commands import app
        from regdrop.commands.streams import allow_any_encoding
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "regdrop":
            raise
        sys.exit(
            f"regdrop: the command line needs {error.name}, which is not installed; "
            "install the extras: pip install 'regdrop[tasks]'"
        )
    except KeyboardInterrupt:  # the libraries take seconds to load
        sys.exit(130)
    allow_any_encoding()
    app()
