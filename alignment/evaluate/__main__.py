"""Run the command: `python -m alignment.evaluate --help`."""

from alignment.signals import run_command

if __name__ == "__main__":
    run_command("alignment.evaluate")
