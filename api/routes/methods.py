"""/v1/methods: what can be trained with, and each method's settings as JSON Schema."""

from fastapi import APIRouter

from api.answers import documented
from api.auth import Reader
from api.views import ListView, MethodView
from trainer.methodconfig import METHOD_CONFIGS

router = APIRouter(prefix="/v1/methods", tags=["methods"], responses=documented(401, 403, 413, 429, 503))


@router.get("")
def list_methods(_: Reader) -> ListView[MethodView]:
    methods = [
        MethodView(
            name=name,
            summary=config.summary,
            paper=config.paper,
            default_learning_rate=config.default_learning_rate,
            json_schema=config.model_json_schema(),
        )
        for name, config in METHOD_CONFIGS.items()
    ]
    return ListView[MethodView](data=methods, has_more=False, first_id=methods[0].name, last_id=methods[-1].name)
