"""Scans HOST PORT CA-FILE with sslyze and prints what is not Mozilla-intermediate, as JSON.

Runs in an environment of its own: sslyze wants an older `cryptography` than the ACME client does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sslyze import (
    CertificateInfoExtraArgument,
    ScanCommandsExtraArguments,
    Scanner,
    ServerNetworkLocation,
    ServerScanRequest,
)
from sslyze.mozilla_tls_profile.tls_config_checker import (
    SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
    MozillaTlsConfiguration,
    ServerNotCompliantWithTlsConfiguration,
    TlsConfigurationEnum,
    check_server_against_tls_configuration,
)

VERSIONS = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3")


def main(host: str, port: str, ca: str) -> None:
    extra = CertificateInfoExtraArgument(custom_ca_file=Path(ca))
    scanner = Scanner()
    scanner.queue_scans(
        [
            ServerScanRequest(
                ServerNetworkLocation(host, int(port), ip_address="127.0.0.1"),
                scan_commands=SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
                scan_commands_extra_arguments=ScanCommandsExtraArguments(certificate_info=extra),
            )
        ]
    )
    for found in scanner.get_results():
        issues: dict[str, str] = {}
        try:
            profile = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
            check_server_against_tls_configuration(found, profile)
        except ServerNotCompliantWithTlsConfiguration as exc:
            issues = exc.issues
        result: Any = found.scan_result
        assert result is not None
        ciphers = {
            version: [
                c.cipher_suite.name
                for c in getattr(result, f"{version}_cipher_suites").result.accepted_cipher_suites
            ]
            for version in VERSIONS
        }
        renegotiation = result.session_renegotiation.result
        json.dump(
            {
                "issues": issues,
                "ciphers": ciphers,
                "curves": sorted(c.name for c in result.elliptic_curves.result.supported_curves or ()),
                "compression": result.tls_compression.result.supports_compression,
                "renegotiation": renegotiation.is_vulnerable_to_client_renegotiation_dos,
            },
            sys.stdout,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
