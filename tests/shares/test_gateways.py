from __future__ import annotations

import asyncio

import pytest
from support.shares import World

from guestpass.errors import Conflict, Invalid, JoinTokenRejected, NotFound
from guestpass.model import Revocation
from guestpass.tokens import JOIN_PREFIX

KEY, OTHER_KEY = bytes(range(32)), bytes(32)


async def test_enroll(w: World) -> None:
    token = await w.service.create_join_token("plant-a")
    assert token.startswith(JOIN_PREFIX)
    assert token.encode() not in w.store.path.read_bytes()
    gateway = await w.service.enroll(token, "plant-a-1", KEY)
    assert (gateway.site, gateway.name, gateway.public_key) == ("plant-a", "plant-a-1", KEY)
    assert await w.service.find_gateway("plant-a", "plant-a-1") == gateway
    assert await w.service.find_gateway("plant-b", "plant-a-1") is None
    assert w.types() == ["join_token.created", "gateway.enrolled"]


async def test_a_lost_answer_can_be_asked_for_again(w: World) -> None:
    token = await w.service.create_join_token("plant-a")
    first = await w.service.enroll(token, "g1", KEY)
    assert await w.service.enroll(token, "g1", KEY) == first
    assert w.types().count("gateway.enrolled") == 1


@pytest.mark.parametrize(("name", "key"), [("g2", OTHER_KEY), ("g1", OTHER_KEY), ("g2", KEY)])
async def test_a_token_enrols_one_gateway(w: World, name: str, key: bytes) -> None:
    token = await w.service.create_join_token("plant-a")
    await w.service.enroll(token, "g1", KEY)
    with pytest.raises(JoinTokenRejected, match="has been used"):
        await w.service.enroll(token, name, key)
    assert len(await w.service.list_gateways()) == 1


async def test_of_several_at_once_one_gets_in(w: World) -> None:
    token = await w.service.create_join_token("plant-a")
    keys = [bytes([n]) * 32 for n in range(8)]
    done = await asyncio.gather(
        *(w.service.enroll(token, f"g{n}", key) for n, key in enumerate(keys)), return_exceptions=True
    )
    assert sum(not isinstance(d, BaseException) for d in done) == 1
    assert len(await w.service.list_gateways()) == 1


async def test_tokens_that_are_no_good(w: World) -> None:
    token = await w.service.create_join_token("plant-a", ttl=60)
    with pytest.raises(JoinTokenRejected, match="unknown or has expired"):
        await w.service.enroll(token + "x", "g1", KEY)
    w.clock.forward(60)
    with pytest.raises(JoinTokenRejected, match="unknown or has expired") as caught:
        await w.service.enroll(token, "g1", KEY)
    assert "guestpass gateway token" in caught.value.hint
    for ttl in (0, -1, 3601):
        with pytest.raises(Invalid):
            await w.service.create_join_token("plant-a", ttl=ttl)
    with pytest.raises(Invalid, match="not the name of a site"):
        await w.service.create_join_token("Plant A")


async def test_a_name_is_bound_to_its_key(w: World) -> None:
    await w.service.enroll(await w.service.create_join_token("plant-a"), "g1", KEY)
    token = await w.service.create_join_token("plant-a")
    with pytest.raises(Conflict, match="another key") as caught:
        await w.service.enroll(token, "g1", OTHER_KEY)
    assert caught.value.error_code == "gateway_exists"
    with pytest.raises(Conflict, match="belongs to the gateway plant-a/g1") as caught:
        await w.service.enroll(token, "g2", KEY)
    assert caught.value.error_code == "gateway_key_exists"
    # The token was not used up by that.
    assert (await w.service.enroll(token, "g2", OTHER_KEY)).name == "g2"


async def test_the_same_gateway_may_enrol_with_a_new_token(w: World) -> None:
    first = await w.service.enroll(await w.service.create_join_token("plant-a"), "g1", KEY)
    assert await w.service.enroll(await w.service.create_join_token("plant-a"), "g1", KEY) == first


async def test_bad_keys_and_names(w: World) -> None:
    token = await w.service.create_join_token("plant-a")
    with pytest.raises(Invalid, match="32 bytes"):
        await w.service.enroll(token, "g1", b"short")
    with pytest.raises(Invalid, match="not the name of a gateway"):
        await w.service.enroll(token, "../g1", KEY)


async def test_remove(w: World) -> None:
    token = await w.service.create_join_token("plant-a")
    await w.service.enroll(token, "g1", KEY)
    await w.service.enroll(await w.service.create_join_token("plant-b"), "g1", OTHER_KEY)
    with pytest.raises(Conflict, match="several sites have a gateway g1: plant-a, plant-b"):
        await w.service.remove_gateway(None, "g1")
    await w.service.remove_gateway("plant-a", "g1")
    assert w.revocations == [Revocation("gateway_removed", gateway=("plant-a", "g1"))]
    assert await w.service.find_gateway("plant-a", "g1") is None
    with pytest.raises(JoinTokenRejected):  # an old token does not bring it back
        await w.service.enroll(token, "g1", KEY)
    with pytest.raises(NotFound) as caught:
        await w.service.remove_gateway("plant-a", "g1")
    assert caught.value.error_code == "gateway_not_found"
    await w.service.remove_gateway(None, "g1")
    assert await w.service.list_gateways() == []
    assert w.types().count("gateway.removed") == 2


async def test_last_seen(w: World) -> None:
    await w.service.enroll(await w.service.create_join_token("plant-a"), "g1", KEY)
    w.service.seen("plant-a", "g1", w.clock.forward(5))
    assert (await w.service.list_gateways())[0].last_seen == w.clock.at
    w.service.seen("plant-a", "g1")
    await w.service.close()
    found = await w.service.find_gateway("plant-a", "g1")
    assert found is not None
    assert found.last_seen == w.clock.at
