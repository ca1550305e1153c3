"""A verdict signed with an ssh key, so that a later stage need not trust the storage that the file came through.

`ssh-keygen -Y sign` makes `VERDICT.sig` beside the file, `ssh-keygen -Y verify` checks it against a file of allowed
signers (both since OpenSSH 8.0; see ssh-keygen(1), ALLOWED SIGNERS).

What it protects from: someone who can change artifacts of a CI run or a release page, but has no signing key. What it
does not: someone who can run the signing job, or who holds the key. The verdict names the candidate by the hash of its
weights, so a signed verdict says nothing about other weights; who deploys has to compare that hash (`compress show`).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from compress.errors import IntegrityError, UserError, WorkError

NAMESPACE = "compress-verdict"
"""Signatures made for another purpose with the same key do not pass as verdicts."""


def signature_path(verdict: Path) -> Path:
    """Where the signature of a verdict file lies."""
    return verdict.with_name(verdict.name + ".sig")


def check_key(key: Path) -> None:
    """Raises UserError where there is no such key: better before the work than after it."""
    if not key.is_file():
        raise UserError(f"there is no ssh key {key}", "make one: ssh-keygen -t ed25519 -f release_key")


def sign(verdict: Path, key: Path) -> Path:
    """Signs a verdict file with an ssh private key (or a public one whose private half an agent holds).

    Raises:
        UserError: there is no such key, or ssh-keygen cannot use it.
        WorkError: ssh-keygen is not installed.
    """
    check_key(key)
    target = signature_path(verdict)
    target.unlink(missing_ok=True)
    done = _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, str(verdict))
    if done.returncode != 0 or not target.is_file():
        raise UserError(
            f"ssh-keygen cannot sign with {key}: {_last_line(done)}",
            "give an ssh key without a passphrase, or one that an agent holds",
        )
    return target


def verify(verdict: Path, allowed_signers: Path) -> str:
    """Checks the signature beside a verdict file; returns the name of who signed.

    Raises:
        UserError: there is no file of allowed signers.
        IntegrityError: there is no signature, it is of another file, or none of the allowed signers made it.
        WorkError: ssh-keygen is not installed.
    """
    if not allowed_signers.is_file():
        raise UserError(
            f"there is no file {allowed_signers}", "one line per signer: NAME ssh-ed25519 AAAA..., see ssh-keygen(1)"
        )
    signature = signature_path(verdict)
    if not signature.is_file():
        raise IntegrityError(f"{verdict} is not signed", "sign it: `compress gate ... --output FILE --sign KEY`")
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(allowed_signers))
    names = found.stdout.split()
    refusal = IntegrityError(
        f"the signature of {verdict} was not made by an allowed signer, or the file was changed after it",
        "run the gate again where the key is, and fetch both files anew",
    )
    if found.returncode != 0 or not names:
        raise refusal
    who = names[0].split(",")[0]
    arguments = ("-f", str(allowed_signers), "-I", who, "-n", NAMESPACE, "-s", str(signature))
    if _ssh_keygen("verify", *arguments, stdin=verdict.read_text("utf-8")).returncode != 0:
        raise refusal
    return who


def _ssh_keygen(action: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["ssh-keygen", "-Y", action, *arguments], input=stdin, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise WorkError("ssh-keygen is not installed", "install OpenSSH 8.0 or newer, or leave signing out") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"
