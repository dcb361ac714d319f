"""The experiments are not in the package any more: python examples/paper/train.py --help, in a copy of the source."""

raise ImportError(__doc__)
