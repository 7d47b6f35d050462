"""Who is there? Verifies the assertions that Guestpass sends to an application: `pip install "PyJWT[crypto]"`.

    python verify.py https://share.example.com plant/dashboards < assertions

One assertion a line, of X-Guestpass-Assertion; prints the address that it proves, or why it is refused."""

import sys

import jwt


class Verifier:
    """One for the life of the application: it keeps the keys, and fetches them again when a new one signs."""

    def __init__(self, edge: str, audience: str) -> None:
        self._edge = edge
        self._audience = audience
        self._keys = jwt.PyJWKClient(f"{edge}/.well-known/jwks.json", lifespan=300, timeout=10)

    def email(self, assertion: str) -> str:
        """The proven address. Raises jwt.PyJWTError."""
        claims = jwt.decode(
            assertion,
            self._keys.get_signing_key_from_jwt(assertion).key,
            algorithms=["EdDSA"],  # never the one that the assertion names
            issuer=self._edge,
            audience=self._audience,
            options={"require": ["exp", "iat", "email"]},
        )
        return str(claims["email"])


if __name__ == "__main__":
    verifier = Verifier(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        try:
            print(verifier.email(line.strip()))
        except jwt.PyJWTError as exc:
            print(f"refused: {exc}")
