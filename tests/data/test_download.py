"""Downloads from a server of this machine that breaks connections, lies, and sends damaged files."""

import contextlib
import gzip
import hashlib
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from corpora import abstract
from nlm_xml import article, write_set

from biomamba_jax import prepare
from biomamba_jax.data import download
from biomamba_jax.data.download import Downloader, Remote, choose, list_files
from biomamba_jax.data.input_files import checksums
from biomamba_jax.data.nlm import read_articles
from biomamba_jax.errors import UserError
from biomamba_jax.folders import locked

NAMES = {
    "baseline": ["pubmed26n0001.xml.gz", "pubmed26n0002.xml.gz"],
    "updatefiles": ["pubmed26n0010.xml.gz", "pubmed26n0011.xml.gz"],
}


class Mirror:
    """A server of four files; `faults[name]` are what its next answers for that file do instead of the right thing."""

    def __init__(self, folder: Path):
        self.files: dict[str, bytes] = {}
        for part, names in NAMES.items():
            for number, name in enumerate(names):
                pmids = range(100 * number + 1, 100 * number + 60)
                path = write_set(folder / name, *(article(pmid, abstract((part, pmid))) for pmid in pmids))
                self.files[f"/pubmed/{part}/{name}"] = path.read_bytes()
                path.unlink()
        for path, content in list(self.files.items()):
            name = path.rsplit("/")[-1]
            self.files[f"{path}.md5"] = f"MD5({name})= {hashlib.md5(content).hexdigest()}\n".encode()
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        self.stopped = threading.Event()

    def handler(mirror):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.rsplit("/")[-1]
                mirror.requests.append((name, self.headers.get("Range")))
                fault = mirror.faults[name].pop(0) if mirror.faults[name] else ""
                if self.path in ("/pubmed/baseline/", "/pubmed/updatefiles/"):
                    links = (p.rsplit("/")[-1] for p in mirror.files if p.startswith(self.path))
                    listing = "".join(f'<a href="{n}">{n}</a>\n' for n in links).encode()
                    return self.send(listing, 200, "abc" if fault == "no number" else None)
                if self.path not in mirror.files or fault == "gone":
                    return self.send_error(404)
                if fault == "slow":
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(OSError):  # the other side has gone
                        for _ in range(3000):  # it ends, so that whoever does not stop gets the file in the end
                            if mirror.stopped.wait(0.01):
                                break
                            self.wfile.write(b".")
                    return None
                if fault == "busy":
                    return self.send_error(503)
                content, status = mirror.files[self.path], 200
                if fault == "damaged":
                    content = content[:50] + bytes([content[50] ^ 1]) + content[51:]
                asked = self.headers.get("Range")
                if asked and fault != "no ranges":
                    begin = int(asked.removeprefix("bytes=").removesuffix("-"))
                    if begin >= len(content):
                        return self.send_error(416)
                    content, status = content[begin:], 206
                cut = len(content) // 2 if fault == "cut" else len(content)
                return self.send(content[:cut], status, "abc" if fault == "no number" else len(content))

            def send(self, content, status, length=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

        return Handler


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = Mirror(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), mirror.handler())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_port}/pubmed"
    yield mirror
    mirror.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def downloader(tmp_path) -> Downloader:
    return Downloader(tmp_path / "nlm", tries=4, timeout=5, pause=0.001)


def fetch_all(mirror, downloader, part="all", connections=3) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    downloader.fetch_all(list_files(mirror.url, part), connections, lambda file, what: told.append((file.name, what)))
    return told


def assert_whole(mirror, folder: Path, parts=("baseline", "updatefiles")) -> None:
    names = [name for part in parts for name in NAMES[part]]
    assert {path.name for path in folder.iterdir()} - {"lock"} == {*names, *(f"{name}.md5" for name in names)}
    for part in parts:
        for name in NAMES[part]:
            assert (folder / name).read_bytes() == mirror.files[f"/pubmed/{part}/{name}"]
            checksums(folder / name)


def test_files_arrive_whole_with_their_sums_in_parallel(mirror, downloader):
    told = fetch_all(mirror, downloader)
    assert_whole(mirror, downloader.folder)
    assert Counter(what for _, what in told) == {"fetched": 4}
    assert len(list(read_articles(downloader.folder / NAMES["baseline"][0]))) == 59


@pytest.mark.parametrize(("part", "folders"), [("baseline", ["baseline"]), ("updates", ["updatefiles"])])
def test_baseline_and_updates_can_be_had_alone(mirror, downloader, part, folders):
    fetch_all(mirror, downloader, part)
    assert_whole(mirror, downloader.folder, folders)


def test_what_is_there_whole_is_not_fetched_again_and_what_is_damaged_is(mirror, downloader):
    fetch_all(mirror, downloader)
    first, second = (downloader.folder / name for name in NAMES["baseline"])
    second.write_bytes(second.read_bytes()[:-3])
    mirror.requests.clear()
    told = dict(fetch_all(mirror, downloader))
    assert told[second.name] == "fetched"
    assert told[first.name] == "there"
    assert [name for name, _ in mirror.requests if name.endswith(".gz")] == [second.name]
    assert_whole(mirror, downloader.folder)


def test_ctrl_c_ends_downloads_that_would_go_on_for_ever(mirror, downloader):
    first, second = NAMES["baseline"]
    mirror.faults[second] = ["slow"]

    def interrupt(file, what):
        if file.name == first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downloader.fetch_all(list_files(mirror.url, "baseline"), 2, interrupt)
    assert (downloader.folder / first).exists() and not (downloader.folder / second).exists()
    fetch_all(mirror, downloader, "baseline")  # and the same one goes on
    assert_whole(mirror, downloader.folder, ["baseline"])


def test_two_downloads_into_one_folder_are_refused(mirror, downloader):
    with locked(downloader.folder), pytest.raises(UserError, match="another run uses it"):
        fetch_all(mirror, downloader)


def test_a_folder_that_cannot_be_made_is_named(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be made"):
        fetch_all(mirror, Downloader(tmp_path / "file"))


def test_a_broken_connection_goes_on_where_it_broke(mirror, downloader):
    name = NAMES["baseline"][0]
    mirror.faults[name] = ["cut", "cut"]
    told = fetch_all(mirror, downloader)
    size = len(mirror.files[f"/pubmed/baseline/{name}"])
    ranges = [asked for requested, asked in mirror.requests if requested == name]
    assert ranges == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert next(what for file, what in told if file == name).startswith("again: the connection broke")
    assert_whole(mirror, downloader.folder)


def test_what_an_earlier_run_left_is_gone_on_with(mirror, downloader):
    name = NAMES["updatefiles"][1]
    content = mirror.files[f"/pubmed/updatefiles/{name}"]
    downloader.folder.mkdir()
    (downloader.folder / f"{name}.partial").write_bytes(content[:700])
    fetch_all(mirror, downloader)
    assert (name, "bytes=700-") in mirror.requests
    assert_whole(mirror, downloader.folder)


@pytest.mark.parametrize("left", [b"another file's beginning", b"x" * 100_000])
def test_a_wrong_beginning_is_thrown_away_and_the_file_fetched_again(mirror, downloader, left):
    name = NAMES["baseline"][1]
    downloader.folder.mkdir()
    (downloader.folder / f"{name}.partial").write_bytes(left)
    told = fetch_all(mirror, downloader)
    assert any(file == name and "MD5" in what for file, what in told)
    assert_whole(mirror, downloader.folder)


@pytest.mark.parametrize("faults", [["damaged"], ["busy", "busy"], ["cut", "no ranges"], ["cut", "damaged", "cut"]])
def test_faults_are_told_and_overcome(mirror, downloader, faults):
    name = NAMES["baseline"][0]
    mirror.faults[name] = list(faults)
    told = fetch_all(mirror, downloader)
    assert [what for file, what in told if file == name][-1] == "fetched"
    assert_whole(mirror, downloader.folder)


def test_a_file_that_stays_broken_is_named_and_the_others_arrive(mirror, downloader):
    bad, gone = NAMES["baseline"][0], NAMES["updatefiles"][0]
    mirror.faults[bad] = ["damaged"] * 9
    mirror.faults[gone] = ["gone"] * 9
    with pytest.raises(UserError) as caught:
        fetch_all(mirror, downloader)
    message = str(caught.value)
    assert message.startswith("2 of 4 files are missing")
    assert bad in message and "MD5" in message
    assert gone in message and "HTTP 404" in message
    there = {path.name for path in downloader.folder.iterdir() if path.suffix == ".gz"}
    assert there == {NAMES["baseline"][1], NAMES["updatefiles"][1]}
    assert sum(name == gone for name, _ in mirror.requests) == 1
    mirror.faults.clear()
    fetch_all(mirror, downloader)
    assert_whole(mirror, downloader.folder)


def test_a_sidecar_without_a_sum_is_no_proof(mirror, downloader):
    mirror.files[f"/pubmed/baseline/{NAMES['baseline'][0]}.md5"] = b"<html>sorry</html>"
    with pytest.raises(UserError, match="holds no MD5 sum"):
        fetch_all(mirror, downloader, "baseline")


def test_over_one_connection_one_file_follows_the_other(mirror, downloader):
    fetch_all(mirror, downloader, connections=1)
    names = [name for part in NAMES.values() for name in part]
    requested = [name for name, _ in mirror.requests if name]
    assert requested == [each for name in names for each in (f"{name}.md5", name)]


def test_a_mirror_without_listings_is_refused(mirror):
    for url in (f"{mirror.url}/nothing", "http://127.0.0.1:9/", "nonsense"):
        with pytest.raises(UserError, match="listing cannot be read"):
            list_files(url, "baseline", tries=1, timeout=2)


def test_a_listing_without_end_is_left(mirror, monkeypatch):
    monkeypatch.setattr(download, "_LONGEST_TEXT", 20)
    with pytest.raises(UserError, match=r"listing cannot be read .more than 0 MB arrive"):
        list_files(mirror.url, "baseline", tries=1)


@pytest.mark.parametrize("timeout", [".inf", "1e9", "0"])
def test_a_time_that_no_connection_has_is_refused(timeout):
    with pytest.raises(UserError, match=r"timeout = .*: must be above 0 s, and at most a day"):
        prepare.main(["download", f"--timeout={timeout}"])


FILES = [Remote(f"pubmed26n{number:04d}.xml.gz", "") for number in (1, 2, 3, 1334, 1335)]


def test_files_are_chosen_by_number():
    assert [file.name[9:13] for file in choose(FILES, "1-2,1335")] == ["0001", "0002", "1335"]
    assert choose(FILES, None) == FILES


@pytest.mark.parametrize("numbers", ["", "a", "3-1", "1-5", "7", "9" * 5000])
def test_numbers_that_name_no_file_are_refused(numbers):
    with pytest.raises(UserError, match="--numbers"):
        choose(FILES, numbers)


def test_the_command_tells_what_it_fetched_and_what_it_had_to_fetch_again(mirror, tmp_path, capsys):
    name = NAMES["updatefiles"][1]
    mirror.faults[name] = ["cut"]
    options = ["download", "--mirror", mirror.url, "--output", str(tmp_path / "o"), "--numbers", "1,10-11"]
    prepare.main(options)
    printed = capsys.readouterr()
    assert printed.out.startswith("3 files fetched, 0 were there")
    assert f"{name}: again" in printed.err
    prepare.main(options)
    assert capsys.readouterr().out.startswith("0 files fetched, 3 were there")


def test_the_fixture_s_files_are_gzip(mirror):
    assert all(gzip.decompress(content) for name, content in mirror.files.items() if name.endswith(".gz"))


@pytest.mark.parametrize("name", ["pubmed26n0001.xml.gz", "pubmed26n0001.xml.gz.md5"])
def test_a_server_that_drips_bytes_is_left_and_tried_again(mirror, tmp_path, name):
    mirror.faults[name] = ["slow"]
    said = []
    files = [file for file in list_files(mirror.url, "baseline") if name.startswith(file.name)]
    Downloader(tmp_path / "nlm", tries=4, timeout=0.3, pause=0.001).fetch_all(
        files, 1, lambda file, what: said.append(what)
    )
    assert said[-1] == "fetched"
    assert said[0].startswith("again: ") and said[0].endswith("bytes/s arrive, less than 1000")


def test_a_length_that_is_no_number_is_not_needed(mirror, downloader, tmp_path):
    name = "pubmed26n0002.xml.gz"
    for answer in ("", name, f"{name}.md5"):
        mirror.faults[answer] = ["no number"]
    downloader.fetch_all(list_files(mirror.url, "baseline", tries=1), 1, lambda file, what: None)
    assert (tmp_path / "nlm" / name).read_bytes() == mirror.files[f"/pubmed/baseline/{name}"]
    assert not any(mirror.faults.values())
