"""Run the command: `python -m alignment.train --help`."""

from alignment.signals import run_command

if __name__ == "__main__":
    run_command("alignment.train")
