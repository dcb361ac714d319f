"""``python -m implicitlayer.experiments``; see :mod:`implicitlayer.experiments`."""

from implicitlayer.experiments._command_line import main

if __name__ == "__main__":
    main()
