"""libp2p's TLS handshake: the certificate that binds a QUIC connection's key to an identity, made and checked.

https://github.com/libp2p/specs/blob/master/tls/tls.md. The certificate's own key is a fresh P-256 key of this process;
the extension 1.3.6.1.4.1.53594.1.1 holds the identity key and its signature over that key.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from clawnet.errors import WireError
from clawnet.identity.keys import KeyPair, peer_id_of, verify
from clawnet.net.identify import decode_key, encode_key

EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
CERTIFICATE_BYTES_MAX = 4_096

_SIGNED_PREFIX = b"libp2p-tls-handshake:"
_SEQUENCE, _OCTETS = 0x30, 0x04
_VALID_FROM = datetime.datetime(1975, 1, 1, tzinfo=datetime.UTC)
_VALID_TO = datetime.datetime(4096, 1, 1, tzinfo=datetime.UTC)


def make_certificate(identity: KeyPair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A self-signed certificate that proves `identity`, and the key it is for.

    It is valid at any time: what limits its life is the private key, which never leaves this process.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.SERIAL_NUMBER, str(x509.random_serial_number()))])
    proof = _octets(encode_key(identity.public)) + _octets(identity.sign(_SIGNED_PREFIX + _key_info(key.public_key())))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_TO)
        .add_extension(x509.UnrecognizedExtension(EXTENSION, _tagged(_SEQUENCE, proof)), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def peer_of(certificate: x509.Certificate, now: datetime.datetime) -> str:
    """The peer id that the certificate proves, given that TLS has proven possession of its key.

    Raises WireError: not self-signed, expired, an unknown critical extension, no or a wrong proof, no Ed25519 identity.
    """
    try:
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise WireError("the peer's certificate is not valid now")
        certificate.verify_directly_issued_by(certificate)
        extensions = list(certificate.extensions)
        key_info = _key_info(certificate.public_key())
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError, x509.DuplicateExtension) as problem:
        raise WireError("the peer's certificate is not a sound self-signed one") from problem
    proof = b""
    for extension in extensions:
        if extension.oid == EXTENSION and isinstance(extension.value, x509.UnrecognizedExtension):
            proof = extension.value.value
        elif extension.critical:
            raise WireError(f"the peer's certificate has the unknown critical extension {extension.oid.dotted_string}")
    if not proof:
        raise WireError("the peer's certificate names no libp2p identity")
    body, rest = _untagged(_SEQUENCE, proof)
    encoded_key, body = _untagged(_OCTETS, body)
    signature, body = _untagged(_OCTETS, body)
    if rest or body:
        raise WireError("the peer's identity proof is malformed")
    public = decode_key(encoded_key)
    if not verify(public, _SIGNED_PREFIX + key_info, signature):
        raise WireError("the peer's TLS key is not signed by its identity key")
    return peer_id_of(public)


def _key_info(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _octets(data: bytes) -> bytes:
    return _tagged(_OCTETS, data)


def _tagged(tag: int, data: bytes) -> bytes:
    """One DER element; what is written here stays below 64 KiB."""
    size = len(data)
    if size < 0x80:
        return bytes((tag, size)) + data
    width = 1 if size < 0x100 else 2
    return bytes((tag, 0x80 | width)) + size.to_bytes(width, "big") + data


def _untagged(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The content of the DER element at the front, and what follows it; WireError when it is another or cut off."""
    if len(data) < 2 or data[0] != tag:
        raise WireError("the peer's identity proof is malformed")
    size, at = data[1], 2
    if size & 0x80:
        width = size & 0x7F
        at += width
        if width not in (1, 2) or len(data) < at:
            raise WireError("the peer's identity proof is malformed")
        size = int.from_bytes(data[2:at], "big")
    if len(data) < at + size:
        raise WireError("the peer's identity proof is cut off")
    return data[at : at + size], data[at + size :]
