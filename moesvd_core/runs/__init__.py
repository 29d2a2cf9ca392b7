"""Work that outlives whoever asked for it: run folders, the worker that fills them, and the client that pages and command line use.

Importing the package is cheap; only `stages`, `workbench` and `source` need torch.
"""
