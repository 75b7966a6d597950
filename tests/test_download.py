"""`course_lib.data.download` and `unpack` against a server that misbehaves in every way that
servers do."""
import hashlib
import io
import random
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from course_lib import files as D
from course_lib.data import download, get_data, unpack

BODY = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves by the first word of the path: whole, cut, wrong, short, deaf, drip, stall, missing,
    broken, odd, endless; and keeps a log."""
    daemon_threads = True
    def handle_error(self, request, address): pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        how, _, name = self.path.strip("/").partition("/")
        body = self.server.files.get(name, BODY)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        self.server.log.append((how, start))
        if how == "missing": return self.send_error(404)
        if how == "broken": return self.send_error(500)
        if how == "stall": return self.server.stop.wait(20)
        if how == "wrong": body = body[::-1]
        if how == "short": body = body[:-5]
        if how == "login": body = b"<html>please log in</html>"
        if how in ("deaf", "deafcut", "login"): start = 0
        if start >= len(body): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range",
                             f"bytes {start + 7 * (how == 'odd')}-{len(body) - 1}/{len(body)}")
        if how != "endless": self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if how in ("cut", "deafcut"): rest = rest[:100_000]
        if how == "drip": return self.drip(rest)
        if how == "midstall":
            self.wfile.write(rest[:50_000]); self.wfile.flush()
            return self.server.stop.wait(20)
        self.wfile.write(rest)
        if how == "endless":
            for _ in range(50): self.wfile.write(body)

    def drip(self, rest):
        for i in range(400):
            if self.server.stop.wait(.05): return
            self.wfile.write(rest[i:i + 1]); self.wfile.flush()


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.log, server.files, server.stop = [], {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01),
                              daemon=True)
    thread.start()
    server.url = lambda how, name="file.bin": f"http://127.0.0.1:{server.server_port}/{how}/{name}"
    yield server
    server.stop.set(); server.shutdown(); server.server_close()


@pytest.fixture
def fetch(server, tmp_path):
    def fetch(*hows, size=len(BODY), md5=MD5, **more):
        return download([server.url(how) for how in hows], tmp_path / "sub" / "file.bin", size, md5,
                        **({"timeout": 5} | more))
    fetch.dest, fetch.part = tmp_path / "sub" / "file.bin", tmp_path / "sub" / "file.bin.part"
    return fetch


def left(fetch): return sorted(p.name for p in fetch.dest.parent.iterdir())


def test_whole(fetch, server):
    assert fetch("whole") == fetch.dest and fetch.dest.read_bytes() == BODY
    assert left(fetch) == ["file.bin"]
    assert fetch("whole") == fetch.dest and len(server.log) == 1


def test_nothing_known_about_the_file(fetch):
    assert fetch("whole", size=None, md5=None).read_bytes() == BODY


def test_a_line_that_breaks_is_resumed(fetch, server):
    assert fetch("cut").read_bytes() == BODY
    assert server.log == [("cut", 0), ("cut", 100_000), ("cut", 200_000)]


def test_the_next_source_goes_on_where_the_last_stopped(fetch, server):
    assert fetch("cut", "whole", tries=1).read_bytes() == BODY
    assert server.log == [("cut", 0), ("whole", 100_000)]


def test_resuming_in_another_session(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY[:123_456])
    assert fetch("whole").read_bytes() == BODY and server.log == [("whole", 123_456)]


def test_a_finished_part_needs_no_server(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY)
    assert fetch("missing").read_bytes() == BODY and server.log == []


def test_a_server_that_ignores_ranges(fetch, server, capsys):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY[:1000])
    assert fetch("deaf").read_bytes() == BODY
    assert "starting again" in capsys.readouterr().out and server.log == [("deaf", 1000)]


def test_a_server_that_ignores_ranges_and_breaks_off(fetch, server):
    with pytest.raises(OSError, match="broke off"): fetch("deafcut")
    assert len(server.log) <= 3 and not fetch.dest.exists()


def test_a_server_that_sends_another_range(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY[:1000])
    assert fetch("odd").read_bytes() == BODY and server.log == [("odd", 1000), ("odd", 0)]


def test_wrong_bytes_are_thrown_away(fetch, server, capsys):
    assert fetch("wrong", "whole").read_bytes() == BODY
    assert server.log == [("wrong", 0), ("whole", 0)] and "thrown away" in capsys.readouterr().out


def test_only_wrong_bytes(fetch):
    with pytest.raises(OSError, match="checksum"): fetch("wrong")
    assert left(fetch) == []


def test_a_wrong_part_is_thrown_away_and_fetched_afresh(fetch, server, capsys):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(b"x" * 1000)
    assert fetch("whole").read_bytes() == BODY
    assert server.log == [("whole", 1000), ("whole", 0)]
    assert "thrown away" in capsys.readouterr().out


def test_a_part_that_is_too_long(fetch, server, capsys):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY + b"more")
    assert fetch("whole").read_bytes() == BODY and server.log == [("whole", 0)]
    assert "starting again" in capsys.readouterr().out


def test_a_part_that_is_too_long_where_the_size_is_not_known(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(BODY + b"more")
    assert fetch("whole", size=None).read_bytes() == BODY
    assert server.log == [("whole", len(BODY) + 4), ("whole", 0)]


def test_parts_are_not_mixed_without_a_checksum(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(b"x" * 1000)
    assert fetch("missing", "whole", md5=None).read_bytes() == BODY
    assert server.log[-1] == ("whole", 0)


@pytest.mark.parametrize("how", ["short", "login"])
def test_a_file_of_another_size_is_not_even_fetched(fetch, how):
    with pytest.raises(OSError, match="offers"): fetch(how)
    assert not fetch.dest.exists()
    assert fetch(how, "whole").read_bytes() == BODY


def test_a_server_that_does_not_stop(fetch):
    with pytest.raises(OSError, match="more than 300,000"): fetch("endless")
    assert not fetch.dest.exists()


def test_a_wrong_file_in_place_is_replaced(fetch, capsys):
    fetch.dest.parent.mkdir()
    fetch.dest.write_bytes(b"old")
    assert fetch("whole").read_bytes() == BODY and "fetching it again" in capsys.readouterr().out


def test_a_wrong_file_in_place_survives_a_failure(fetch):
    fetch.dest.parent.mkdir()
    fetch.dest.write_bytes(b"old")
    with pytest.raises(OSError): fetch("missing")
    assert fetch.dest.read_bytes() == b"old"


@pytest.mark.parametrize("how", ["stall", "drip", "midstall"])
def test_slow_and_silent_servers_are_given_up_on(fetch, how):
    start = time.monotonic()
    assert fetch(how, "whole", timeout=.3).read_bytes() == BODY
    assert time.monotonic() - start < 5


def test_all_sources_fail(fetch, server):
    with pytest.raises(OSError) as error: fetch("missing", "broken", "stall", "drip", timeout=.3)
    text = str(error.value)
    for how, why in dict(missing="404", broken="500", stall="timed out", drip="too slow").items():
        assert any(server.url(how) in line and why in line for line in text.splitlines())
    assert str(fetch.dest) in text and "300,000 bytes" in text and not fetch.dest.exists()


def test_nobody_is_listening(tmp_path):
    with pytest.raises(OSError, match="127.0.0.1:9/x"):
        download(["http://127.0.0.1:9/x"], tmp_path / "x", timeout=2)


# archives

def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_unpack(tmp_path):
    first, second = (tar(tmp_path / "1.tar", [("top/a", b"1")]),
                     tar(tmp_path / "2.tgz", [("top/b", b"2")], "w:gz"))
    out = unpack([first, second], tmp_path / "new" / "out")
    assert (out / "top/a").read_bytes() == b"1" and (out / "top/b").read_bytes() == b"2"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    with pytest.raises(FileExistsError): unpack(first, out)


@pytest.mark.parametrize("member", [("../escaped", b"x"), ("/tmp/escaped", b"x"),
                                    ("a/../../escaped", b"x"),
    special("link", tarfile.SYMTYPE, "/etc/passwd"), special("link", tarfile.SYMTYPE, "ok"),
                                    special("link", tarfile.LNKTYPE, "ok"),
    special("pipe", tarfile.FIFOTYPE), special("device", tarfile.CHRTYPE)], ids=str)
def test_evil_archives_leave_nothing_behind(tmp_path, member):
    evil = tar(tmp_path / "evil.tar", [("ok", b"fine"), member])
    with pytest.raises(ValueError, match="evil.tar cannot be unpacked"):
        unpack(evil, tmp_path / "in" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["evil.tar", "in"]


def test_a_link_cannot_be_written_through(tmp_path):
    (tmp_path / "target").mkdir()
    evil = tar(tmp_path / "evil.tar", [special("d", tarfile.SYMTYPE, str(tmp_path / "target")),
                                       ("d/file", b"x")])
    with pytest.raises(ValueError): unpack(evil, tmp_path / "out")
    assert not list((tmp_path / "target").iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_broken_archives(tmp_path, mode):
    whole = tar(tmp_path / "a.tar", [("a", BODY)], mode).read_bytes()
    for content in (whole[:len(whole) // 2], b"no archive", b""):
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(ValueError, match="b.tar"): unpack(tmp_path / "b.tar", tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".unpacking*"))


# VOC by name, from the server

XML = ("<annotation><size><width>8</width><height>6</height></size><object><name>cat</name>"
       "<bndbox><xmin>3</xmin><ymin>2</ymin>"
       "<xmax>5</xmax><ymax>3</ymax></bndbox></object></annotation>").encode()


def members(base, splits):
    for split in splits:
        yield f"{base}/ImageSets/Main/{split}.txt", f"{split}1\n".encode()
        yield f"{base}/Annotations/{split}1.xml", XML
        yield f"{base}/JPEGImages/{split}1.jpg", b"not opened"


@pytest.fixture
def mirror(server, tmp_path, monkeypatch):
    "A server that has miniature archives under VOC's names, and a data root that is empty."
    (tmp_path / "build").mkdir(); (tmp_path / "root").mkdir()
    archives = {}
    for name, base, splits in (("trainval.tar", "VOCdevkit/VOC2007", ["train", "val"]),
                               ("test.tar", "VOCdevkit/VOC2007", ["test"])):
        body = server.files[name] = tar(tmp_path / "build" / name,
                                        members(base, splits)).read_bytes()
        archives.setdefault("2007", []).append((name, len(body), hashlib.md5(body).hexdigest()))
    both = [*members("pascal-voc/VOC2007", ["train", "val", "test"]),
            *members("pascal-voc/VOC2012", ["train", "val"])]
    server.files["pascal-voc.tgz"] = tar(tmp_path / "build" / "both.tgz", both, "w:gz").read_bytes()
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "root"))
    monkeypatch.setattr(D, "_ARCHIVES", archives)
    monkeypatch.setattr(D, "_HOSTS", [server.url("missing", "{name}"), server.url("cut", "{name}")])
    monkeypatch.setattr(D, "_FASTAI", server.url("missing", "pascal-voc.tgz"))
    return tmp_path / "root"


def test_voc_is_downloaded_once(mirror, server):
    data = get_data("voc2007")
    assert [r[0].path.stem for r in (data.train, data.valid,
                                     data.test)] == ["train1", "val1", "test1"]
    assert data.train[0].boxes.tolist() == [[2, 1, 5, 3]]
    assert [p.name for p in mirror.iterdir()] == ["VOCdevkit"]
    assert [p.name for p in (mirror / "VOCdevkit").iterdir()] == ["VOC2007"]
    requests = len(server.log)
    get_data("voc2007")
    assert len(server.log) == requests


def test_fast_ais_archive_is_the_last_resort(mirror, server, monkeypatch, capsys):
    monkeypatch.setattr(D, "_HOSTS", [server.url("missing", "{name}")])
    monkeypatch.setattr(D, "_FASTAI", server.url("whole", "pascal-voc.tgz"))
    assert len(get_data("voc2007").test) == 1 and "Trying fast.ai" in capsys.readouterr().out
    assert sorted(p.name for p in (mirror / "VOCdevkit").iterdir()) == ["VOC2007", "VOC2012"]
    assert len(get_data("voc0712").train) == 3


def test_no_source_at_all(mirror, server, monkeypatch):
    monkeypatch.setattr(D, "_HOSTS", [server.url("missing", "{name}")])
    with pytest.raises(OSError, match="by hand|browser"): get_data("voc2007")
    assert not (mirror / "VOCdevkit").exists()


def test_an_archive_put_there_by_hand(mirror, server, monkeypatch):
    monkeypatch.setattr(D, "_HOSTS", [server.url("missing", "{name}")])
    for name, _, _ in D._ARCHIVES["2007"]: (mirror / name).write_bytes(server.files[name])
    assert len(get_data("voc2007").train) == 1 and server.log == []


def test_an_unpacking_that_fails_leaves_no_data_set(mirror, monkeypatch):
    real = D.unpack
    def fails(archives, folder):
        real(archives, folder)
        raise ValueError("the power went out")
    monkeypatch.setattr(D, "unpack", fails)
    with pytest.raises(ValueError, match="power"): get_data("voc2007")
    assert not (mirror / "VOCdevkit" / "VOC2007").exists()
    monkeypatch.setattr(D, "unpack", real)
    assert len(get_data("voc2007").train) == 1


def test_the_real_addresses_are_plausible():
    for year, archives in D._ARCHIVES.items():
        for name, size, md5 in archives:
            assert name.endswith(".tar") and size > 4e8 and size % 512 == 0 and len(md5) == 32
    for host in D._HOSTS: assert host.format(year="2007", name="x.tar").endswith("/x.tar")
