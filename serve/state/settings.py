"""Settings of routes: names, defaults, limits, shadow and log policy, one versioned row a route.

Every method is one short transaction. Knows nothing about HTTP or about what a setting does.
"""

from __future__ import annotations

from sqlalchemy import Engine, and_, insert, select, update
from sqlalchemy.exc import IntegrityError

from contracts.errors import ConflictError
from contracts.routes import RouteSettings
from serve.state.tables import route_settings


class SettingsState:
    """Typed access to the route settings of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def settings(self) -> dict[str, RouteSettings]:
        """All settings by route; a route without any is not in it."""
        with self._engine.connect() as db:
            rows = db.execute(select(route_settings.c.route, route_settings.c.body)).all()
        return {route: RouteSettings.model_validate_json(body) for route, body in rows}

    def get_settings(self, route: str) -> RouteSettings | None:
        """The settings of a route, or None when it never had any."""
        query = select(route_settings.c.body).where(route_settings.c.route == route)
        with self._engine.connect() as db:
            body = db.execute(query).scalar()
        return None if body is None else RouteSettings.model_validate_json(body)

    def put_settings(self, settings: RouteSettings) -> None:
        """Write settings whose version is exactly one above the stored one (1 for a route without any).

        Raises: ConflictError when somebody else wrote in between.
        """
        route, version, body = settings.route, settings.version, settings.model_dump_json()
        with self._engine.begin() as db:
            if version == 1:
                try:
                    with db.begin_nested():
                        db.execute(insert(route_settings).values(route=route, version=1, body=body))
                except IntegrityError as err:
                    raise ConflictError(
                        f"route {route!r} already has settings; read them and write version + 1."
                    ) from err
                return
            where = and_(route_settings.c.route == route, route_settings.c.version == version - 1)
            if (
                db.execute(update(route_settings).where(where).values(version=version, body=body)).rowcount
                != 1
            ):
                raise ConflictError(
                    f"settings of route {route!r} were changed by somebody else: "
                    f"they are not at version {version - 1} any more."
                )
