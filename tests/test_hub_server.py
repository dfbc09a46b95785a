# SPDX-License-Identifier: Apache-2.0
"""The Hub server of the tests, by huggingface_hub's own client over HTTP: repositories, files, revisions, access."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, close_session, point_client_at
from hub_server.helpers import (
    FILES,
    LFS_SIZES,
    REPO,
    SHA256,
    WEIGHTS,
    blobs_sent,
    client_of,
    commit_body,
    raw_request,
    read_files,
    status_of,
    text_file,
    upload,
    write_files,
)
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    create_branch,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "folder", FILES)


# Repositories and access


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_repository_from_creation_to_deletion(hub, api, kind) -> None:
    more = {"space_sdk": "gradio"} if kind == "space" else {}
    assert not api.repo_exists(REPO, repo_type=kind)
    url = api.create_repo(REPO, repo_type=kind, **more)
    assert (url.repo_id, url.repo_type, str(url)) == (REPO, kind, f"{hub.url}/{hub.repository(REPO, kind).page}")
    with pytest.raises(HfHubHTTPError, match="already created") as refused:
        api.create_repo(REPO, repo_type=kind, **more)
    assert status_of(refused) == 409
    assert api.create_repo(REPO, repo_type=kind, exist_ok=True, **more) == url
    assert [key for key in hub.repositories if key[1] == REPO] == [(kind, REPO)]
    api.delete_repo(REPO, repo_type=kind)
    assert not api.repo_exists(REPO, repo_type=kind) and not hub.repositories
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO, repo_type=kind)
    api.delete_repo(REPO, repo_type=kind, missing_ok=True)


def test_private_is_not_there_for_others(hub, api) -> None:
    api.create_repo(REPO, private=True)
    upload(api, b"{}", "config.json")
    assert api.repo_info(REPO).private
    for token in (hub.other_token, False):
        assert not client_of(hub, token).repo_exists(REPO)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "config.json", token=token)
    assert client_of(hub, hub.read_token).list_repo_files(REPO) == [".gitattributes", "config.json"]
    api.update_repo_settings(REPO, private=False)
    assert Path(hf_hub_download(REPO, "config.json", token=False)).read_bytes() == b"{}"


def test_tokens(hub, api, repo) -> None:
    assert api.whoami()["name"] == "tester" and api.whoami()["auth"]["accessToken"]["role"] == "write"
    writes = (
        lambda client: client.create_repo("tester/more"),
        lambda client: client.delete_repo(REPO),
        lambda client: upload(client, b"x", "x.txt"),
    )
    for token, status, message in (
        (False, 401, "Invalid username"),
        ("hf_nobody", 401, "Invalid credentials"),
        (hub.read_token, 403, "must use a write token"),
        (hub.other_token, 403, "rights to write"),
    ):
        for write in writes:
            with pytest.raises(HfHubHTTPError, match=message) as refused:
                write(client_of(hub, token))
            assert status_of(refused) == status
    assert list(hub.repositories) == [("model", REPO)] and len(hub.repository(REPO).commits) == 1
    assert api.create_repo("laboratory/shared").repo_id == "laboratory/shared"  # an organization of the user
    with pytest.raises(HfHubHTTPError, match="401"):
        client_of(hub, "hf_nobody").list_repo_files(REPO)  # even where no token is needed
    assert client_of(hub, False).list_repo_files(REPO) == [".gitattributes"]


def test_gated_files_are_for_those_let_in(hub, api, repo) -> None:
    upload(api, b"{}", "config.json")
    api.update_repo_settings(REPO, gated="manual")
    assert api.model_info(REPO).gated == "manual"
    for token, status in ((False, 401), (hub.other_token, 403)):
        assert client_of(hub, token).list_repo_files(REPO) == [".gitattributes", "config.json"]
        with pytest.raises(GatedRepoError) as refused:
            hf_hub_download(REPO, "config.json", token=token)
        assert status_of(refused) == status
        with pytest.raises(GatedRepoError):
            client_of(hub, token).auth_check(REPO)
    hub.repository(REPO).granted.add("stranger")
    assert Path(hf_hub_download(REPO, "config.json", token=hub.other_token)).read_bytes() == b"{}"


# Uploads and downloads


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_folder_comes_back_byte_for_byte(hub, api, folder, kind) -> None:
    api.create_repo(REPO, repo_type=kind, space_sdk="static" if kind == "space" else None)
    if kind == "space":
        (folder / "README.md").write_text("---\nsdk: static\n---\n")
    info = api.upload_folder(repo_id=REPO, repo_type=kind, folder_path=folder, commit_message="All of it")
    repository = hub.repository(REPO, kind)
    assert [commit.title for commit in repository.history()] == ["All of it", "initial commit"]
    assert repository.commit().id == info.oid
    in_lfs = {path for path, file in repository.commit().files.items() if file.lfs}
    assert in_lfs == {"model.safetensors", "pictures/preview.png"} and not repository.uncommitted()
    assert blobs_sent(hub) == LFS_SIZES
    expected = read_files(folder)
    assert read_files(snapshot_download(REPO, repo_type=kind)) == expected
    for name, content in expected.items():
        path = hf_hub_download(REPO, name, repo_type=kind, revision=info.oid, force_download=True)
        assert Path(path).read_bytes() == content
    # Neither writing to the storage nor reading from it takes the token along.
    assert {line.authorization for line in hub.requests(path="^/storage/")} == {None}


def test_second_download_asks_for_the_etag_only(hub, api, repo, folder, tmp_path) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    for name in ("config.json", "model.safetensors"):
        for into in ({}, {"local_dir": tmp_path / "local"}):
            first = hf_hub_download(REPO, name, **into)
            hub.log.clear()
            assert hf_hub_download(REPO, name, **into) == first
            assert [line.method for line in hub.requests(path=name)] == ["HEAD"]
            assert sum(line.sent for line in hub.requests()) == 0
    upload(api, b"changed", "config.json")
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == b"changed"


def test_unchanged_files_make_no_commit_and_send_no_blob(hub, api, repo, folder) -> None:
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.log.clear()
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == first.oid and blobs_sent(hub) == [] and not hub.requests("POST", "/commit/")
    upload(api, WEIGHTS, "copy.safetensors")  # a new file of known content
    assert blobs_sent(hub) == [] and hub.repository(REPO).files()["copy.safetensors"] == WEIGHTS


def test_large_blob_goes_in_parts(hub, api, repo, tmp_path) -> None:
    hub.multipart_threshold, hub.part_size = 5000, 4000
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS)
    upload(api, path)
    assert blobs_sent(hub) == [2240, 4000, 4000] and len(hub.requests("POST", "complete_multipart")) == 1
    assert hub.repository(REPO).files()["model.safetensors"] == WEIGHTS
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


def test_what_goes_to_lfs_and_what_is_ignored(hub, api, repo) -> None:
    hub.regular_limit = 100
    files = {"notes.txt": b"short", "long.txt": b"l" * 101, "old.bin": b"b"}
    files |= {"logs/run.txt": b"r", "logs/keep.txt": b"k"}
    files |= {"root.log": b"1", "deep/root.log": b"2", ".gitignore": b"# rules\nlogs/\n/root.log\n!logs/keep.txt\n"}
    operations = [CommitOperationAdd(path, io.BytesIO(content)) for path, content in files.items()]
    api.create_commit(REPO, operations, commit_message="Rules")
    ignored = {"logs/run.txt", "root.log"}
    commit = hub.repository(REPO).commit()
    assert set(commit.files) == {".gitattributes", *files} - ignored
    assert {path for path, file in commit.files.items() if file.lfs} == {"long.txt", "old.bin"}
    api.upload_file(path_or_fileobj=b"x", path_in_repo="logs/later.txt", repo_id=REPO)  # by the stored .gitignore
    assert "logs/later.txt" not in hub.repository(REPO).files()


def test_copies_and_deletions(hub, api, repo, folder) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    operations = [
        CommitOperationCopy("model.safetensors", "old/model.safetensors"),
        CommitOperationCopy("config.json", "old/config.json"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("code/"),
    ]
    api.create_commit(REPO, operations, commit_message="Move")
    files = hub.repository(REPO).files()
    assert files["old/model.safetensors"] == WEIGHTS and files["old/config.json"] == FILES["config.json"]
    assert "config.json" not in files and "code/näme with space.py" not in files
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("config.json", REPO)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="nowhere")


def test_tree_history_and_card(hub, api, repo, folder) -> None:
    hub.page_size = 2
    first = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    second = upload(api, b"{}", "config.json", commit_message="Second", commit_description="Why")
    tree = {item.path: item for item in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert set(tree) == {".gitattributes", *FILES, "code", "pictures"}
    assert len(hub.requests("GET", "/tree/main")) == 4
    assert (tree["model.safetensors"].lfs.sha256, tree["model.safetensors"].size) == (SHA256, len(WEIGHTS))
    assert tree["config.json"].lfs is None and tree["config.json"].last_commit.oid == second.oid
    assert tree["code"].last_commit.oid == tree["README.md"].last_commit.oid == first.oid
    assert [item.path for item in api.list_repo_tree(REPO, "code")] == ["code/näme with space.py"]
    found = api.get_paths_info(REPO, ["config.json", "missing", "code"], expand=True)
    assert [(item.path, item.last_commit.title) for item in found] == [("config.json", "Second"), ("code", "First")]
    commits = api.list_repo_commits(REPO)
    assert [(c.title, c.message) for c in commits] == [("Second", "Why"), ("First", ""), ("initial commit", "")]
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == second.oid and info.card_data.license == "apache-2.0" and "vision" in info.tags
    assert {item.rfilename: item.size for item in info.siblings}["config.json"] == 2
    assert api.model_info(REPO, revision=first.oid).sha == first.oid


def test_readme_is_checked(hub, api, repo) -> None:
    for text, message in (("---\nlicense: [3]\n---\n", "license"), ("---\na: [\n---\n", "Invalid YAML")):
        with pytest.raises(ValueError, match=message):
            upload(api, text.encode(), "README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        upload(api, b"# No metadata\n", "README.md")
    # The server looks again, for clients that do not ask first.
    answer = raw_request(
        hub, "POST", f"/api/models/{REPO}/commit/main", commit_body(text_file("README.md", "---\na: [\n---\n"))
    )
    assert answer[0] == 400 and "Invalid metadata" in answer[1]
    assert hub.repository(REPO).files()["README.md"] == b"# No metadata\n"


def test_space_settings(hub, api) -> None:
    variables = [{"key": "CHECKPOINT", "value": "tester/tiny"}]
    api.create_repo(REPO, repo_type="space", space_sdk="gradio", space_variables=variables)
    api.add_space_variable(REPO, "SIZE", "512", description="pixels")
    api.add_space_secret(REPO, "KEY", "hidden")
    found = api.get_space_variables(REPO)
    assert {key: item.value for key, item in found.items()} == {"CHECKPOINT": "tester/tiny", "SIZE": "512"}
    assert found["SIZE"].description == "pixels" and "SIZE" not in api.delete_space_variable(REPO, "SIZE")
    assert hub.repository(REPO, "space").secrets["KEY"]["value"] == "hidden"
    assert "hidden" not in raw_request(hub, "GET", f"/api/spaces/{REPO}/secrets")[1]
    with pytest.raises(HfHubHTTPError, match="403"):
        client_of(hub, hub.other_token).get_space_variables(REPO)
    assert api.get_space_runtime(REPO).stage == "NO_APP_FILE"
    api.upload_file(path_or_fileobj=b"", path_in_repo="app.py", repo_id=REPO, repo_type="space")
    assert api.get_space_runtime(REPO).stage == "RUNNING" and api.space_info(REPO).sdk == "gradio"


# Branches, tags, pull requests, conflicts


def test_branches_and_tags(hub, api, repo) -> None:
    first = upload(api, b"1", "a.txt")
    api.create_tag(REPO, tag="v1", tag_message="one")
    api.create_branch(REPO, branch="dev/next", revision="v1")
    second = upload(api, b"2", "a.txt", revision="dev/next")
    read = {revision: Path(hf_hub_download(REPO, "a.txt", revision=revision)).read_bytes()
            for revision in ("main", "v1", "dev/next", first.oid, second.oid)}  # fmt: skip
    assert read == {"main": b"1", "v1": b"1", first.oid: b"1", "dev/next": b"2", second.oid: b"2"}
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first.oid, "dev/next": second.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first.oid}
    for again in (lambda: api.create_tag(REPO, tag="v1"), lambda: api.create_branch(REPO, branch="dev/next")):
        with pytest.raises(HfHubHTTPError, match="already exists"):
            again()
    with pytest.raises(RevisionNotFoundError):
        upload(api, b"3", "a.txt", revision="v1")  # nobody commits to a tag
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="dev/next")
    assert list(hub.repository(REPO).refs) == ["refs/heads/main"]


def test_stranger_opens_a_pull_request(hub, api, repo) -> None:
    upload(api, b"1", "a.txt")
    stranger = client_of(hub, hub.other_token)
    proposal = upload(stranger, WEIGHTS, create_pr=True, commit_message="Weights for you")
    assert proposal.pr_num == 1 and proposal.pr_url == f"{hub.url}/{REPO}/discussions/1"
    upload(stranger, b"2", "a.txt", revision="refs/pr/1")
    assert hub.repository(REPO).files()["a.txt"] == b"1" and "model.safetensors" not in hub.repository(REPO).files()
    assert Path(hf_hub_download(REPO, "a.txt", revision="refs/pr/1")).read_bytes() == b"2"
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    opened = [(item.num, item.title, item.author, item.status) for item in api.get_repo_discussions(REPO)]
    assert opened == [(1, "Weights for you", "stranger", "open")]
    empty = stranger.create_pull_request(REPO, title="Nothing yet")
    assert empty.is_pull_request and empty.target_branch == "refs/heads/main" and empty.num == 2


def test_commit_on_an_outdated_parent_is_refused(hub, api, repo) -> None:
    first = upload(api, b"1", "a.txt")
    second = upload(api, b"2", "a.txt", parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        upload(api, b"3", "a.txt", parent_commit=first.oid)
    assert status_of(refused) == 412
    assert hub.repository(REPO).commit().id == second.oid and hub.repository(REPO).files()["a.txt"] == b"2"


# The fixture


def test_client_is_offline_before_and_after(tmp_path) -> None:
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    assert constants.is_offline_mode()
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_this_machine")
        point_client_at(server, tmp_path, patch)
        assert not constants.is_offline_mode() and get_token() is None
        # The endpoint is the default one, for clients made before and after.
        HfApi(token=server.token).create_repo(REPO)
        create_branch(REPO, branch="next", token=server.token)
        assert list(server.repository(REPO).refs) == ["refs/heads/main", "refs/heads/next"]
        assert Path(constants.HF_HUB_CACHE).parent == tmp_path
        close_session()
    assert {name: value for name, value in vars(constants).items() if name.isupper()} == before


def test_crash_of_the_server_is_not_taken_for_an_answer() -> None:
    with pytest.raises(RuntimeError, match="crashed"), HubServer() as server:
        server.repositories = None
        assert raw_request(server, "GET", f"/api/models/{REPO}")[0] == 500


CHILD = """
import sys
sys.modules["efficientsam_hf"] = None
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, token=sys.argv[2])
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
torch.save(model.state_dict(), sys.argv[3])
"""


def test_model_with_its_code_loads_from_the_hub(hub, api, tmp_path) -> None:
    import torch

    from efficientsam_hf import EfficientSamConfig, EfficientSamModel

    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    small = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2}
    model = EfficientSamModel(
        EfficientSamConfig(
            vision_config={**vision, "output_channels": 32},
            prompt_encoder_config={"hidden_size": 32},
            mask_decoder_config=small,
        )
    )
    model.save_pretrained(tmp_path / "saved")
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "saved")
    command = [sys.executable, "-c", CHILD, REPO, hub.token, str(tmp_path / "loaded.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    loaded = torch.load(tmp_path / "loaded.pt")
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
