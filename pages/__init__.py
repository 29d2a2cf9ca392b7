"""The explorer: one file a page, in `components` what several pages draw. Pages read run folders and ask the worker for work."""
