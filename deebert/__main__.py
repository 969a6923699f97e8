"""The command `deebert`, also as `python -m deebert`."""

import argparse
import sys
from importlib import import_module

from deebert.utils import cli

COMMANDS = {
    "train": "fine-tune a model with early exit",
    "add-exits": "add early exit to a classifier that is fine-tuned already, without labels",
    "eval": "score and time the exits of a trained model, choose a threshold",
    "predict": "classify texts with a trained or an exported model",
    "serve": "classify texts over HTTP with a trained or an exported model",
    "export": "write a trained model as an ONNX graph",
    "plot": "print threshold sweeps as tables, or draw figures from them",
    "download": "fetch GLUE tasks from the Hugging Face hub",
}


def main() -> None:
    program = "python -m deebert" if sys.argv[0].endswith("__main__.py") else "deebert"
    parser = cli.ArgumentParser(
        prog=program,
        description=f"Early exit for BERT, RoBERTa and others. `{program} COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
        usage=f"{program} COMMAND ...",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the command's own flags")
    if len(sys.argv) == 1:
        parser.print_help()
        return
    args = parser.parse_args()
    sys.argv = [f"{program} {args.command}", *args.flags]
    module = args.command.replace("-", "_")
    import_module(f"deebert.commands.{module}").main()  # imported late: not every command needs torch


def run() -> None:
    """The console command."""
    cli.run(main)


if __name__ == "__main__":
    run()
