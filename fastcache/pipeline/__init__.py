"""The command line and what it needs: options, progress bars, default places, the demo."""
