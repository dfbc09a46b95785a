# SPDX-License-Identifier: Apache-2.0
"""The server: what it holds, who may see and change it, and how it starts and stops."""

import re
import secrets
import threading
from dataclasses import replace
from urllib.parse import quote

# The modules of routes register themselves.
from . import browsing, commits, repositories, uploads  # noqa: F401
from .connections import Handler, Listener
from .faults import Action, Fault
from .messages import Account, HubError, Request, RequestRecord, Response
from .routing import find_route
from .storage import Repository
from .uploads import Upload


MEGABYTE = 1024 * 1024


class HubServer:
    """A Hub on loopback, in memory: `with HubServer() as server: HfApi(endpoint=server.url, token=server.token)`."""

    def __init__(
        self,
        regular_limit: int = 10 * MEGABYTE,
        multipart_threshold: int = 5 * 1024 * MEGABYTE,
        part_size: int = 16 * MEGABYTE,
        page_size: int = 1000,
    ) -> None:
        self.regular_limit, self.multipart_threshold = regular_limit, multipart_threshold
        self.part_size, self.page_size = part_size, page_size
        self.user = "tester"
        self.token, self.read_token, self.other_token = "hf_write", "hf_read", "hf_other"
        self.accounts: dict[str, Account] = {
            self.token: Account(self.user, organizations=("laboratory",)),
            self.read_token: Account(self.user, may_write=False, organizations=("laboratory",)),
            self.other_token: Account("stranger"),
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, Upload] = {}
        self.downloads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[RequestRecord] = []
        self.crashes: list[BaseException] = []
        self.lock = threading.RLock()
        self._listener = Listener(("127.0.0.1", 0), Handler)
        self._listener.hub = self
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02})

    # For tests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where LFS blobs are: the same server by another name, so that clients see another host."""
        return f"http://localhost:{self._listener.server_address[1]}"

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def requests(self, method: str | None = None, path: str = "") -> list[RequestRecord]:
        """The requests of a method whose path contains a regular expression."""
        return [line for line in self.log if method in (None, line.method) and re.search(path, line.path)]

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.close_connections()
        self._listener.server_close()
        # A bug of this server answers 500, which a test of errors could take for what it provoked.
        if self.crashes and kind is None:
            raise RuntimeError("the Hub server crashed while it answered") from self.crashes[0]

    # Access

    def account(self, authorization: str | None) -> Account | None:
        """Whose token this is; a token that nobody has is refused even where none is needed."""
        if authorization is None:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def signed_in(self, request: Request) -> Account:
        if request.account is None:
            raise HubError(401, "Invalid username or password.")
        return request.account

    def check_may_write(self, account: Account, namespace: str) -> None:
        if not account.may_write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not account.belongs_to(namespace):
            raise HubError(403, f'You don\'t have the rights to write to the namespace "{namespace}"')

    def find(self, request: Request, kind: str, repo_id: str) -> Repository:
        """A repository; a private one is not there for others."""
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and not self._is_member(request, repository)):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def readable(self, request: Request) -> Repository:
        kind = request.arguments.get("kinds", "spaces").removesuffix("s")
        return self.find(request, kind, request.argument("id"))

    def open_to(self, request: Request, repository: Repository) -> None:
        """Refuse the files of a gated repository to whoever was not let in."""
        if not repository.gated or self._is_member(request, repository):
            return
        restricted = f"Access to {repository.kind} {repository.id} is restricted"
        if request.account is None:
            raise HubError(401, f"{restricted}. You must have access to it and be authenticated.", "GatedRepo")
        if request.account.name not in repository.granted:
            raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")

    def contributable(self, request: Request, kind: str | None = None, repo_id: str | None = None) -> Repository:
        """A repository for anyone who may propose a change to it."""
        repository = self.find(request, kind, repo_id) if kind and repo_id else self.readable(request)
        account = self.signed_in(request)
        self.check_may_write(account, account.name)
        return repository

    def writable(self, request: Request) -> Repository:
        repository = self.readable(request)
        self.check_may_write(self.signed_in(request), repository.namespace)
        return repository

    def committable(self, request: Request) -> Repository:
        """A repository for its members, and for whoever opened the pull request that the revision names."""
        repository, revision = self.readable(request), request.argument("revision")
        name = self.signed_in(request).name
        own = any(item.author == name and revision == f"refs/pr/{item.number}" for item in repository.discussions)
        return self.contributable(request) if own else self.writable(request)

    def _is_member(self, request: Request, repository: Repository) -> bool:
        return request.account is not None and request.account.belongs_to(repository.namespace)

    # Answering

    def sign_download(self, content: bytes, path: str) -> str:
        """An address at the storage that answers with a blob."""
        grant = secrets.token_hex(8)
        self.downloads[grant] = content
        return f"{self.storage_url}/storage/download/{grant}/{quote(path)}"

    def take_fault(self, method: str, path: str) -> Action | None:
        """What is to go wrong with this request, if anything."""
        with self.lock:
            return next((fault.action for fault in self.faults if fault.take(method, path)), None)

    def answer(self, request: Request, raw_path: str) -> Response:
        """The answer of a route; errors and crashes become answers too."""
        try:
            with self.lock:
                route, arguments = find_route(request.method, raw_path)
                account = self.account(request.headers.get("Authorization"))
                return route(self, replace(request, account=account, arguments=arguments))
        except HubError as error:
            return error.response()
        except Exception as error:
            self.crashes.append(error)
            return HubError(500, f"{type(error).__name__}: {error}").response()
