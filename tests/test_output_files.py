"""A file that a user names for an output may be replaced only by another output of the same kind."""

import pytest

from fastcache.errors import InputError
from fastcache.text_files import PAGE_BEGINS, require_output_file


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x01", b"my notes\n", b"<!DOCTYPE html>"])
def test_a_file_that_is_no_page_of_ours_is_kept(tmp_path, content):
    path = tmp_path / "page.html"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a file of this kind"):
        require_output_file(path, "--html", PAGE_BEGINS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [None, b"", PAGE_BEGINS.encode() + b"\n<html>"])
def test_an_earlier_page_may_be_replaced(tmp_path, content):
    path = tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    require_output_file(path, "--html", PAGE_BEGINS)


@pytest.mark.parametrize("name", ["folder", "..", "s3://bucket/page.html", "text/page.html"])
def test_what_can_be_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("")
    with pytest.raises(InputError, match="--html"):
        require_output_file(tmp_path / name if "://" not in name else type(tmp_path)(name), "--html", PAGE_BEGINS)
