"""Keys: only whole and right ones open, none is stored, and every mistake in a file is one line."""

import hashlib
import hmac
import json
import time

import numpy as np
import pytest

from milora_jax.errors import UserError
from milora_jax.serving import keys
from milora_jax.serving.keys import LOCAL, Keyring, Tenant, digest_of

KEY, OTHER = "sk-" + "a" * 20, "sk-" + "b" * 20


def ring(tmp_path, environment=None, **values):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(values))
    return Keyring.of(path, environment or {})


def tenant(name, key, **more):
    return {"name": name, "sha256": digest_of(key), **more}


def test_a_key_is_its_tenants(tmp_path):
    found = ring(
        tmp_path,
        tenants=[
            tenant("one", KEY, adapters=["math"], concurrency=2),
            tenant("two", OTHER, tokens_per_minute=9),
        ],
        admin=[digest_of("c" * 16)],
    )
    one, two = found.tenant_of(KEY.encode()), found.tenant_of(OTHER.encode())
    assert (one.name, one.concurrency, one.may_use("math"), one.may_use("law")) == ("one", 2, True, False)
    assert (two.name, two.tokens_per_minute, two.may_use("law")) == ("two", 9, True)
    assert found.is_admin(b"c" * 16)
    assert not found.is_admin(KEY.encode())
    assert found.tenant_of(b"c" * 16) is None
    assert not found.open


def test_who_may_read_metrics(tmp_path):
    watcher = "d" * 16
    alone = ring(tmp_path, tenants=[tenant("one", KEY)], admin=[digest_of(OTHER)])
    assert alone.may_read_metrics(KEY.encode()), "there is nobody else"
    assert alone.may_read_metrics(OTHER.encode())
    assert not alone.may_read_metrics(None)
    both = ring(tmp_path, tenants=[tenant("one", KEY), tenant("two", OTHER)], monitor=[digest_of(watcher)])
    assert both.is_monitor(watcher.encode())
    assert both.may_read_metrics(watcher.encode())
    assert both.tenant_of(watcher.encode()) is None
    assert not both.is_admin(watcher.encode())
    assert not any(both.may_read_metrics(key) for key in (KEY.encode(), OTHER.encode(), b"nobody's", None))
    assert Keyring(open=True).may_read_metrics(None)


@pytest.mark.parametrize(
    "wrong", [None, b"", KEY.encode()[:-1], KEY.encode() + b" ", KEY.upper().encode(), b"\xff"]
)
def test_what_is_no_key_opens_nothing(tmp_path, wrong):
    found = ring(tmp_path, tenants=[tenant("one", KEY)], admin=[digest_of(OTHER)])
    assert found.tenant_of(wrong) is None
    assert not found.is_admin(wrong)


def test_the_digest_of_nothing_is_not_nothing(tmp_path):
    empty = hashlib.sha256(b"").hexdigest()
    found = ring(tmp_path, tenants=[{"name": "one", "sha256": empty}], admin=[])
    assert found.tenant_of(None) is None
    assert not Keyring(admins=(bytes.fromhex(empty),)).is_admin(None)


def test_all_keys_are_compared_whichever_is_right(tmp_path, monkeypatch):
    found = ring(tmp_path, tenants=[tenant(f"t{i}", f"{i}" * 16) for i in range(5)])
    compared = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: (compared.append(a), a == b)[1])
    for key in (b"0" * 16, b"4" * 16, b"nobody's"):
        compared.clear()
        found.tenant_of(key)
        assert len(compared) == 5
    assert keys.hmac is hmac


def test_the_environment_has_keys_too(tmp_path):
    found = Keyring.of(None, {"MILORA_API_KEY": KEY, "MILORA_ADMIN_KEY": OTHER})
    assert found.tenant_of(KEY.encode()) == Tenant("default", concurrency=0, alone=True)
    assert found.is_admin(OTHER.encode())
    with pytest.raises(UserError, match="MILORA_API_KEY has 3 characters: expected at least 16"):
        Keyring.of(None, {"MILORA_API_KEY": "abc"})


def test_without_keys_a_server_is_open_but_for_administrators():
    found = Keyring.of(None, {})
    assert found.open
    assert found.tenant_of(None) is LOCAL
    assert not found.is_admin(None)


TENANT = {"name": "x", "sha256": "0" * 64}

BAD = {
    "tenants: Input should be a valid array": {"tenants": {}},
    "admin.0: expected the 64 digits 0-9a-f of a SHA-256; see python -m milora_jax.serving hash-key": {
        "admin": ["abc"]
    },
    "monitor.0: expected the 64 digits 0-9a-f": {"monitor": ["abc"]},
    "tenants.0: Input should be an object": {"tenants": ["x"]},
    "tenants.0.name: String should match pattern '^[A-Za-z0-9]": {"tenants": [{**TENANT, "name": "../x"}]},
    "tenants.0.sha256: Field required": {"tenants": [{"name": "x"}]},
    "tenants.0.sha256: expected the 64 digits 0-9a-f": {"tenants": [{**TENANT, "sha256": "A" * 64}]},
    "tenants.0.adapters": {"tenants": [{**TENANT, "adapters": 3}]},
    "tenants.0.adapters.literal['*']: Input should be '*'": {"tenants": [{**TENANT, "adapters": "math"}]},
    "tenants.0.concurrency: Input should be a valid integer": {"tenants": [{**TENANT, "concurrency": True}]},
    "tenants.0.concurrency: Input should be greater than or equal to 0": {
        "tenants": [{**TENANT, "concurrency": -1}]
    },
    "tenants.0.key: Extra inputs are not permitted": {"tenants": [{**TENANT, "key": "secret"}]},
    "tenant: Extra inputs are not permitted": {"tenant": []},
    "a tenant is given twice: 'x'": {"tenants": [TENANT, {**TENANT, "sha256": "1" * 64}]},
    "a key is given twice": {"tenants": [TENANT], "admin": ["0" * 64]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_in_a_file_is_one_line(tmp_path, message):
    with pytest.raises(UserError) as caught:
        ring(tmp_path, **BAD[message])
    assert message in str(caught.value)
    assert "twice" in message or str(caught.value).startswith(f"{tmp_path / 'keys.json'}: ")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_how_wrong_a_key_is_takes_no_time(tmp_path):
    """Keys that differ in their first letter and in their last one, in random order: Welch's t below 4.5."""
    found = ring(tmp_path, tenants=[tenant(f"t{i}", f"sk-{i:020d}") for i in range(20)])
    right = b"sk-%020d" % 7
    wrong = (b"x" + right[1:], right[:-1] + b"x")
    rng, taken = np.random.default_rng(0), ([], [])
    for which in rng.integers(0, 2, 40000):
        begin = time.perf_counter_ns()
        found.tenant_of(wrong[which])
        taken[which].append(time.perf_counter_ns() - begin)
    # What the scheduler did to a few calls says nothing of ours.
    first, last = (np.sort(each)[: int(0.95 * len(each))] for each in taken)
    spread = (first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last)) ** 0.5
    assert abs(first.mean() - last.mean()) / spread < 4.5
