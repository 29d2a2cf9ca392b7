"""What several pages draw and share. A component knows of no page."""
