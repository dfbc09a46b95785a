# SPDX-License-Identifier: Apache-2.0
"""The Hub server of the tests when something goes wrong: what the client raises, and that no halves are kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import (
    CommitFirst,
    ConnectionFailed,
    CutDownload,
    CutUpload,
    Fault,
    HubServer,
    Refuse,
    record_waits,
)
from hub_server.helpers import (
    FILES,
    LFS_SIZES,
    REPO,
    SHA256,
    WEIGHTS,
    blobs_sent,
    commit_body,
    operation,
    raw_request,
    status_of,
    text_file,
    upload,
    write_files,
)
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "folder", FILES)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return record_waits(monkeypatch)


# While uploading


@pytest.mark.parametrize("reset", [True, False])
def test_cut_upload_is_sent_again(hub, api, repo, waits, reset) -> None:
    fault = Fault(CutUpload(after=3000, reset=reset), method="PUT", path="/storage/upload/")
    hub.faults.append(fault)
    try:
        upload(api, WEIGHTS)
        assert waits == [1]
    except RuntimeError:  # version 1 of the client does not go on after a connection that ends in order
        assert not reset and not hub.repository(REPO).lfs
        upload(api, WEIGHTS)
    assert [(line.status, line.received) for line in hub.requests("PUT")] == [(None, 3000), (200, len(WEIGHTS))]
    assert fault.hits == 1 and hub.repository(REPO).files()["model.safetensors"] == WEIGHTS


def test_cut_part_is_sent_again_alone(hub, api, repo, waits, tmp_path) -> None:
    hub.multipart_threshold, hub.part_size = 5000, 4000
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    hub.faults.append(Fault(CutUpload(after=100, reset=True), method="PUT", path="/storage/upload/", skip=1))
    upload(api, tmp_path / "model.safetensors")
    assert [line.path[-2:] for line in hub.requests("PUT")] == ["/1", "/2", "/2", "/3"]
    assert blobs_sent(hub) == [2240, 4000, 4000] and hub.repository(REPO).files()["model.safetensors"] == WEIGHTS


def test_upload_cut_for_good_leaves_nothing_and_resumes(hub, api, repo, folder, waits) -> None:
    lost = Fault(CutUpload(after=3000, reset=True), method="PUT", path="/storage/upload/", times=6, skip=1)
    hub.faults.append(lost)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert lost.hits == 6 and waits == [1, 2, 4, 8, 8]
    repository, stored = hub.repository(REPO), blobs_sent(hub)
    assert len(repository.commits) == 1 and len(repository.uncommitted()) == len(stored) == 1
    api.upload_folder(repo_id=REPO, folder_path=folder)
    # The blob that had arrived was not sent again.
    assert blobs_sent(hub) == LFS_SIZES
    assert len(repository.commits) == 2 and not repository.uncommitted()
    assert {name: content for name, content in repository.files().items() if name in FILES} == FILES


def test_commit_that_never_arrives(hub, api, repo, folder) -> None:
    hub.faults.append(Fault(CutUpload(after=50), method="POST", path="/commit/"))
    with pytest.raises(ConnectionFailed):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    repository, blobs = hub.repository(REPO), len(blobs_sent(hub))
    assert len(repository.commits) == 1 and len(repository.uncommitted()) == blobs == 2
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(blobs_sent(hub)) == blobs and set(repository.files()) == {".gitattributes", *FILES}


def test_commit_whose_answer_is_lost(hub, api, repo, folder) -> None:
    hub.faults.append(Fault(CutDownload(after=0), method="POST", path="/commit/"))
    with pytest.raises(ConnectionFailed):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    repository = hub.repository(REPO)
    assert len(repository.commits) == 2 and set(repository.files()) == {".gitattributes", *FILES}
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == repository.commit().id and len(repository.commits) == 2 and len(blobs_sent(hub)) == 2


@pytest.mark.parametrize(
    ("path", "method"), [("/preupload/", "POST"), ("/objects/batch", "POST"), ("/upload/", "PUT")]
)
@pytest.mark.parametrize("status", [429, 503])
def test_refused_step_is_tried_again(hub, api, repo, waits, path, method, status) -> None:
    retry_after = 7 if status == 429 else None
    hub.faults.append(Fault(Refuse(status, retry_after=retry_after), path=path, method=method))
    upload(api, WEIGHTS)
    assert [line.status for line in hub.requests(method, path)] == [status, 200]
    assert waits == [8 if status == 429 else 1] and hub.repository(REPO).files()["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_refused_commit_is_not_tried_again(hub, api, repo, waits, status) -> None:
    hub.faults.append(Fault(Refuse(status, message="Not now"), method="POST", path="/commit/"))
    with pytest.raises(HfHubHTTPError, match="Not now") as refused:
        upload(api, WEIGHTS)
    assert status_of(refused) == status and waits == []
    assert len(hub.repository(REPO).commits) == 1 and hub.repository(REPO).uncommitted() == {SHA256}


@pytest.mark.parametrize("status", [401, 403])
def test_token_refused_between_the_steps(hub, api, repo, waits, status) -> None:
    hub.faults.append(Fault(Refuse(status), path="/objects/batch"))
    with pytest.raises(HfHubHTTPError) as refused:
        upload(api, WEIGHTS)
    assert status_of(refused) == status and waits == [] and not hub.repository(REPO).lfs


def test_someone_else_commits_first(hub, api, repo) -> None:
    head = upload(api, b"1", "a.txt").oid
    fault = Fault(CommitFirst("a.txt", b"theirs"), method="POST", path="/commit/", times=2)
    hub.faults.append(fault)
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(api, b"mine", "a.txt", parent_commit=head)
    assert hub.repository(REPO).files()["a.txt"] == b"theirs"
    upload(api, b"mine", "b.txt")  # without a parent the commit goes on top of whatever there is
    files = hub.repository(REPO).files()
    assert (files["a.txt"], files["b.txt"], fault.hits) == (b"theirs", b"mine", 2)


# While downloading


@pytest.fixture
def stored(hub: HubServer, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Weights on the Hub, and a client that writes down what it gets every 1000 bytes."""
    upload(api, WEIGHTS)
    hub.log.clear()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    yield hub
    # Whatever happened, the cache holds no file but the right one.
    for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*"):
        assert path.read_bytes() == WEIGHTS


def complete_files() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.name in (SHA256, "model.safetensors")]


def test_cut_download_is_resumed(stored, waits) -> None:
    stored.faults.append(Fault(CutDownload(after=4000), method="GET", path="model.safetensors"))
    try:
        path = hf_hub_download(REPO, "model.safetensors")
    except ConnectionFailed:  # version 1 of the client resumes in the next call
        assert not complete_files()
        path = hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    gets = stored.requests("GET", "^/storage/download/")
    assert [(line.range, line.status, line.sent) for line in gets] == [
        (None, 200, 4000),
        ("bytes=4000-", 206, len(WEIGHTS) - 4000),
    ]


@pytest.mark.parametrize("cut", [CutDownload(after=0), CutDownload(after=2500, reset=True)], ids=["cut", "reset"])
def test_download_cut_for_good_leaves_no_file(stored, waits, cut) -> None:
    fault = Fault(cut, method="GET", path="model.safetensors", times=100)
    stored.faults.append(fault)
    with pytest.raises(ConnectionFailed):
        hf_hub_download(REPO, "model.safetensors")
    assert fault.hits >= 1 and not complete_files()
    stored.faults.clear()
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_busy_hub_is_asked_again(stored, waits, method) -> None:
    stored.faults.append(Fault(Refuse(429, retry_after=3), method=method, path="model.safetensors"))
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    statuses = [line.status for line in stored.requests(method, "model.safetensors")]
    assert statuses[0] == 429 and len(statuses) == 2
    # Without a file to fall back to, the first HEAD is repeated at once.
    assert waits == ([4] if method == "GET" else [])


def test_hub_that_is_down_leaves_the_cached_file(stored, waits) -> None:
    path = hf_hub_download(REPO, "model.safetensors")
    stored.faults.append(Fault(Refuse(503), times=100))
    assert hf_hub_download(REPO, "model.safetensors") == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json")


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (Refuse(401, "Invalid username or password."), HfHubHTTPError),
        (Refuse(403, "No", code="GatedRepo"), GatedRepoError),
        (Refuse(404, "No", code="RepoNotFound"), RepositoryNotFoundError),
    ],
)
def test_refused_download(stored, waits, refusal, error) -> None:
    stored.faults.append(Fault(refusal, times=100))
    with pytest.raises(error) as refused:
        hf_hub_download(REPO, "model.safetensors")
    assert status_of(refused) == refusal.status and waits == [] and not complete_files()


# Requests that the client does not make


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "header"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b'{"key": "header", "value": {"summary": ""}}', "needs a summary"),
        (b'{"key": "file", "value": {}}', "header"),
        (commit_body(operation("file", path="a", content="!")), "not base64"),
        (commit_body(text_file("../a")), "Invalid path"),
        (commit_body(text_file(".git/config")), "Invalid path"),
        (commit_body(text_file("a"), text_file("a/b")), "is a file"),
        (commit_body(operation("lfsFile", path="a", oid="0" * 64)), "does not exist"),
        (commit_body(operation("lfsFile", path="a", oid=SHA256, size=1)), "bytes, not 1"),
        (commit_body(text_file("a", "A" * 300_000)), "belong in LFS"),
        (commit_body(operation("rename", path="a")), "Unknown operation"),
    ],
)
def test_commit_is_refused_whole(hub, api, repo, body, message) -> None:
    hub.regular_limit = 200_000
    upload(api, WEIGHTS)
    good = commit_body(text_file("good.txt"))
    answer = raw_request(hub, "POST", f"/api/models/{REPO}/commit/main", body)
    assert answer[0] == 400 and message in answer[1]
    mixed = good + b"\n" + body.split(b"\n", 1)[-1] if b"\n" in body else body
    assert raw_request(hub, "POST", f"/api/models/{REPO}/commit/main", mixed)[0] == 400
    assert len(hub.repository(REPO).commits) == 2
    assert raw_request(hub, "POST", f"/api/models/{REPO}/commit/main", good)[0] == 200


def upload_action(hub: HubServer, transfer: str, size: int = len(WEIGHTS)) -> dict[str, Any]:
    """Where to the LFS batch sends the weights."""
    batch = {"operation": "upload", "transfers": [transfer], "objects": [{"oid": SHA256, "size": size}]}
    status, text, _ = raw_request(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", json.dumps(batch).encode())
    assert status == 200
    return json.loads(text.replace(hub.storage_url, "").replace(hub.url, ""))["objects"][0]["actions"]["upload"]


def test_storage_checks_what_it_gets(hub, repo) -> None:
    address = upload_action(hub, "basic")["href"]
    too_long = upload_action(hub, "basic", size=len(WEIGHTS) + 1)["href"]
    assert "Only one auth" in raw_request(hub, "PUT", address, WEIGHTS)[1]
    for target, content, expected in (
        (address, WEIGHTS[:-1], "were announced"),
        (address, WEIGHTS[::-1], "sha256 is not"),
        (too_long, WEIGHTS, "were announced"),
        ("/storage/upload/0", WEIGHTS, "not signed"),
        (address, WEIGHTS, ""),
    ):
        assert hub.repository(REPO).lfs == {}
        for chunked in (True, False):
            status, text, _ = raw_request(hub, "PUT", target, content, chunked, Authorization=None)
            assert (expected in text) if expected else status == 200
    assert hub.repository(REPO).lfs == {SHA256: WEIGHTS}
    wrong = json.dumps({"oid": SHA256, "size": 1}).encode()
    assert raw_request(hub, "POST", f"/{REPO}.git/info/lfs/verify", wrong)[0] == 400


def test_storage_checks_the_parts(hub, repo) -> None:
    hub.multipart_threshold, hub.part_size = 5000, 6000
    action = upload_action(hub, "multipart")
    addresses, parts = [action["header"]["00001"], action["header"]["00002"]], []
    assert action["header"]["chunk_size"] == "6000" and len(action["header"]) == 3

    def complete(parts: list[dict[str, Any]], oid: str = SHA256) -> str:
        body = json.dumps({"oid": oid, "parts": parts}).encode()
        return raw_request(hub, "POST", action["href"], body, Authorization=None)[1]

    for number, address in enumerate(addresses, 1):
        assert "parts are not the ones" in complete(parts)
        content = WEIGHTS[6000 * (number - 1) : 6000 * number]
        status, _, headers = raw_request(hub, "PUT", address, content, Authorization=None)
        parts.append({"partNumber": number, "etag": headers["ETag"]})
        assert status == 200
    status, text, _ = raw_request(hub, "PUT", addresses[0][:-1] + "3", b"x", Authorization=None)
    assert status == 400 and "no part 3" in text
    assert "parts are not the ones" in complete([parts[0], {**parts[1], "etag": '"x"'}])
    assert "upload is for" in complete(parts, oid="0" * 64)
    assert hub.repository(REPO).lfs == {}
    assert "success" in complete(parts) and hub.repository(REPO).lfs == {SHA256: WEIGHTS}


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=10000-", 206, slice(10000, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=10000-99999", 206, slice(10000, None)),
        (f"bytes={len(WEIGHTS)}-", 416, None),
        ("bytes=x-", 400, None),
    ],
)
def test_ranges(hub, api, repo, wanted, status, part) -> None:
    plain = WEIGHTS.replace(b"\0", b"\1")  # a zero byte would send it to LFS
    upload(api, plain, "plain.txt")
    upload(api, WEIGHTS)
    moved = raw_request(hub, "GET", f"/{REPO}/resolve/main/model.safetensors", Range=wanted)
    assert moved[0] == 302 and moved[2]["X-Linked-Etag"] == f'"{SHA256}"'
    storage = moved[2]["Location"].removeprefix(hub.storage_url)
    answers = [
        (plain, raw_request(hub, "GET", f"/{REPO}/resolve/main/plain.txt", Range=wanted)),
        (WEIGHTS, raw_request(hub, "GET", storage, Range=wanted, Authorization=None)),
    ]
    for content, (answered, text, headers) in answers:
        assert answered == status
        if part is not None:
            assert text.encode("latin-1") == content[part]
            assert headers["Content-Range"].endswith(f"/{len(content)}")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", "/api/repos/create", b"[]", 400),
        ("POST", "/api/repos/create", b'{"name": "no spaces"}', 400),
        ("POST", "/api/repos/create", b'{"name": "a", "type": "planet"}', 400),
        ("POST", "/api/repos/create", b'{"name": "a", "type": "space"}', 400),
        ("PUT", f"/api/models/{REPO}/settings", b'{"gated": "sometimes"}', 400),
        ("POST", f"/api/models/{REPO}/preupload/main", b'{"files": [{"path": "a"}]}', 400),
        ("POST", f"/api/models/{REPO}/preupload/main", b'{"files": 3}', 400),
        ("POST", f"/{REPO}.git/info/lfs/objects/batch", b'{"operation": "steal"}', 400),
        ("GET", "/api/models/tester/missing", None, 404),
        ("GET", f"/api/models/{REPO}/tree/main/missing", None, 404),
        ("GET", "/api/trending", None, 501),
    ],
)
def test_malformed_requests(hub, repo, method, path, body, status) -> None:
    answer = raw_request(hub, method, path, body)
    assert answer[0] == status and json.loads(answer[1])["error"] == answer[2]["X-Error-Message"]
    assert list(hub.repositories) == [("model", REPO)]
