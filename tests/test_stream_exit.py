"""A process may end with a stream of units open, however it ends: it says nothing of it, and the exit code stays."""

import subprocess
import sys
import textwrap

import pytest

OPEN = """
    import sys
    import fastcache
    from fastcache.cache_format.stream import unit_stream

    cache = fastcache.open_cache(sys.argv[1])
    stream = unit_stream(cache, "resid_post.1", iter(lambda: 0, -1))  # without end
    next(stream)
"""

ENDINGS = {
    "the end of the script": ("", 0),
    "an exit code": ("sys.exit(3)", 3),
    "a reference that outlives the modules": ("import builtins; builtins.stream = stream", 0),
    "a cycle": ("stream = [stream]; stream.append(stream)", 0),
    "a thread that reads on": (
        """
        import threading
        units = unit_stream(cache, "resid_post.1", (0 for _ in range(4_000)))
        thread = threading.Thread(target=lambda: print(sum(1 for _ in units)))
        thread.start()
        """,
        0,
    ),
    "a daemon thread that reads on": (
        """
        import threading
        threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()
        """,
        0,
    ),
    "reading at exit": ("import atexit; atexit.register(lambda: [next(stream) for _ in range(4_000)])", 0),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_open_stream_is_closed_without_a_word(small_cache, ending):
    code, expected = ENDINGS[ending]
    program = textwrap.dedent(OPEN) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, str(small_cache)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    assert done.returncode == expected
    if ending == "a thread that reads on":
        assert done.stdout == "4000\n"  # all units, though the main thread ended long before


def test_a_damaged_unit_is_told_in_its_turn_where_no_thread_reads(small_cache, tmp_path):
    """As above, after the main thread has ended."""
    code = """
        import threading
        from fastcache.errors import IntegrityError

        def read(units):
            try:
                for _ in units:
                    pass
            except IntegrityError as error:
                print("damaged", threading.main_thread().is_alive())

        real = type(cache.parts[0]).read_unit
        def failing(part, hook, unit, rows, verify):
            if not threading.main_thread().is_alive():
                raise IntegrityError("damaged")
            return real(part, hook, unit, rows, verify)
        type(cache.parts[0]).read_unit = failing
        threading.Thread(target=read, args=(unit_stream(cache, "resid_post.1", iter(lambda: 0, -1)),)).start()
    """
    program = textwrap.dedent(OPEN) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, str(small_cache)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("damaged False\n", "", 0)
