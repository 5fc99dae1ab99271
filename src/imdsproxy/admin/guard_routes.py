"""What operators do about session tokens and boots: revoke, reopen, rotate."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from imdsproxy.admin.dependencies import NamedInstance, Ops, answers
from imdsproxy.admin.operations import GuardChange, KeyRotation
from imdsproxy.admin.shapes import to_json

__all__ = ["router"]

router = APIRouter(prefix="/v1")


@router.post("/instances/{instance}/revoke-tokens", responses=answers(GuardChange))
async def revoke_tokens(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """Have no token be good that the instance has now; fresh ones are."""
    return JSONResponse(to_json(await operations.revoke_tokens(instance)))


@router.post("/instances/{instance}/reopen", responses=answers(GuardChange))
async def reopen_instance(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """Have the instance's boot begin now: what is locked after the boot is open until that is over again."""
    return JSONResponse(to_json(await operations.reopen_instance(instance)))


@router.post("/token-keys/rotate", responses=answers(KeyRotation))
async def rotate_token_keys(operations: Ops) -> JSONResponse:
    """Have a fresh key sign session tokens; those that there are stay good as long as they would be."""
    return JSONResponse(to_json(await operations.rotate_token_keys()))
