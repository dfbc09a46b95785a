# SPDX-License-Identifier: Apache-2.0
"""`efficientsam convert`: a released .pt file becomes a folder for `from_pretrained`."""

import argparse


DESCRIPTION = """\
Convert a released EfficientSAM checkpoint (.pt, or .pt inside the released .zip) to a folder that
EfficientSamModel.from_pretrained and EfficientSamProcessor.from_pretrained read. The variant is read off the shapes.
No code in the file is executed; every weight is accounted for, or the command fails and lists what does not fit."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a released checkpoint",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="released file: efficient_sam_vitt.pt, efficient_sam_vits.pt.zip"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say where the result is."""
    from transformers.utils.logging import disable_progress_bar

    from ..convert import convert_checkpoint

    disable_progress_bar()
    config = convert_checkpoint(args.source, args.destination)
    vision = config.vision_config
    print(f"wrote {args.destination}: encoder of width {vision.hidden_size}, {vision.num_attention_heads} heads")
    return 0
