"""Entry of `python -m examples.train`."""

from examples.train.train import main

main()
