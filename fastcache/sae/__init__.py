"""The SAE side: architectures, initialisation, schedules, metrics, files. torch only."""
