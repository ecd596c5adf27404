"""Certificates and keys of a deployment on this machine; a real one has them from its own authority, see the README."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from datamodules.atomic import write_atomically

_VALID = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Certificates:
    """What a SuperLink shows, and what it is trusted by.

    Attributes:
        authority: File of the certificate that clients trust.
        server: File of the server's certificate.
        server_key: File of its private key.
    """

    authority: Path
    server: Path
    server_key: Path


def write_certificates(folder: Path, host: str) -> Certificates:
    """Make an authority that signs one certificate and is gone: its key is never written.

    Args:
        folder: Folder of the files; made if missing, for its owner only.
        host: Name or address that the server is reached by.

    Returns:
        Where the files are.

    Raises:
        OSError: A file could not be written.
    """
    made = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority_name, server_name = _name("fewlight rehearsal CA"), _name(host)
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        _certificate(server_name, authority_name, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    write_atomically(made.authority, authority.public_bytes(serialization.Encoding.PEM))
    write_atomically(made.server, server.public_bytes(serialization.Encoding.PEM))
    _write_private(made.server_key, server_key, serialization.PrivateFormat.PKCS8)
    return made


def write_node_key(folder: Path, name: str) -> Path:
    """Make the key that a SuperNode proves itself with, as `ssh-keygen -t ecdsa -b 384` does.

    Args:
        folder: Folder of the files; made if missing, for its owner only.
        name: Name of the private key; that of the public one has `.pub` added.

    Returns:
        The file of the private key.

    Raises:
        OSError: A file could not be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_private(folder / name, key, serialization.PrivateFormat.OpenSSH)
    write_atomically(folder / f"{name}.pub", public + b"\n")
    return folder / name


def write_secret(path: Path, secret: bytes) -> None:
    """Write what nobody else may read.

    Args:
        path: File; its folder is made if missing, and is for its owner only.
        secret: Its content.

    Raises:
        OSError: The file could not be written.
    """
    # The folder is closed first: the file is nobody else's to read even before its own mode is set.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    write_atomically(path, secret)
    path.chmod(0o600)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    write_secret(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _VALID)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
