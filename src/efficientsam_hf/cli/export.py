# SPDX-License-Identifier: Apache-2.0
"""`efficientsam export`: a run folder becomes a model folder to keep or to publish."""

import argparse


DESCRIPTION = """\
Write the model of a run as a folder for from_pretrained, with its processor, metrics.json and a model card that is
made from the run. Weights are stored as float16 and load as float32.

  efficientsam export runs/scenes my-model
  efficientsam evaluate my-model --annotations A.json --images DIR --output metrics.json
  efficientsam export runs/scenes my-model --metrics metrics.json --overwrite"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "export",
        help="turn a run into a model folder with a card",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder that efficientsam finetune or pretrain wrote")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write")
    parser.add_argument(
        "--metrics", nargs="+", metavar="A.json", help="results of efficientsam evaluate --output, for the card"
    )
    parser.add_argument("--speed", metavar="S.json", help="result of efficientsam benchmark --output, for the card")
    parser.add_argument("--license", default="apache-2.0", metavar="ID", help="of the weights, by the Hub's names")
    parser.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="write the mean of the run's weights and of these models, from which it went on or that went on from it",
    )
    parser.add_argument("--best", action="store_true", help="the model of the best evaluation, not the last one")
    parser.add_argument("--full-precision", action="store_true", help="store the weights as float32")
    parser.add_argument("--with-code", action="store_true", help="add the code for trust_remote_code")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    from transformers.utils.logging import disable_progress_bar

    from ..hub.model_folder import export_run

    disable_progress_bar()
    destination = export_run(
        args.run_folder,
        args.destination,
        half=not args.full_precision,
        metrics=args.metrics,
        speed=args.speed,
        with_code=args.with_code,
        overwrite=args.overwrite,
        average=args.average,
        license=args.license,
        best=args.best,
    )
    weights = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    print(f"wrote {args.destination}: {weights / 1e6:.1f} MB of weights")
    return 0
