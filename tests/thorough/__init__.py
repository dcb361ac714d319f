"""The long run: thousands of random problems with known answers, and the figures that the library must hold.

``python -m tests.thorough --help``; ``make test-thorough``. pytest collects the smoke test only.
"""
