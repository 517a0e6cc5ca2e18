#!/bin/sh
# Creates .env for docker compose: a password and a token for Label Studio, and where settings go. An existing file is
# never changed, because the account and the token count only when Label Studio starts for the first time.
set -eu
umask 077

if [ -e .env ]; then
    echo ".env exists and stays as it is"
    exit 0
fi

random_hex() { # $1: number of bytes
    od -An -v -N "$1" -tx1 /dev/urandom | tr -d ' \n'
}

# A new file that appears at once: an interrupted run leaves no half-written .env, and two runs do not mix.
partial=.env.$$
trap 'rm -f "$partial"' EXIT
cat >"$partial" <<EOF
# For docker compose. Keep this file: the account and the token count only at the first start of Label Studio.
LABEL_STUDIO_USERNAME=annotator@example.com
LABEL_STUDIO_PASSWORD=$(random_hex 8)
LABEL_STUDIO_TOKEN=$(random_hex 20)

# The address at which people open Label Studio, and its port on this machine.
LABEL_STUDIO_HOST=http://localhost:8080
LS_PORT=8080

# cpu, or gpu on a machine with the NVIDIA Container Toolkit.
COMPOSE_PROFILES=cpu

# Settings of Facings, see docs/settings.md: NAME=value, for example
# CHECKPOINT=facings-nano
EOF
if ln "$partial" .env 2>/dev/null; then
    echo "created .env; the login of Label Studio is in it"
else
    echo ".env exists and stays as it is"
fi
