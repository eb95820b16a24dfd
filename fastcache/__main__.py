"""The `fastcache` program, and `python -m fastcache`: Ctrl-C is understood from the first import on, and bugs say so."""

import sys

EXIT_INTERRUPTED, EXIT_BUG = 130, 70
"""70 is EX_SOFTWARE of sysexits.h: 1 is damage that `fastcache verify` found, 2 what a user can mend."""


def run() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from fastcache.pipeline.cli import main

        main()
    except KeyboardInterrupt:  # while modules are imported; later ones end in `main`
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            "This is a bug in fastcache, or in a package that it uses: please report it with the lines above. What was "
            "committed before is kept.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BUG)


if __name__ == "__main__":
    run()
