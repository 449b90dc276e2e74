"""LangChain, LlamaIndex and Haystack over a running server and in process: their own standard tests, the vectors."""

import asyncio
import importlib
import os

import numpy as np
import pytest

import matryo as mt
from matryo.clients import Local
from matryo.core.errors import InputError

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
TEXTS = ["a puzzle game for the terminal", "library for reading images"]


def framework(name, package):
    pytest.importorskip(package, reason=f"the {name} extra is not installed")
    return importlib.import_module(f"matryo.clients.{name}")


@pytest.fixture(scope="module")
def words(static_model):
    return mt.load(static_model)


@pytest.fixture(params=["http", "local"], scope="module")
def source(request, guarded, words, documents):
    """A client of the running server, or the same model and index in this process."""
    if request.param == "http":
        server, key = guarded
        with mt.Client(server.url, key) as client:
            yield client
    else:
        with mt.Index.open(documents, read_only=True) as index:
            yield Local(words, index)


@pytest.fixture(scope="module")
def unit(words):
    return words.encode(TEXTS, width=16)


@pytest.fixture(scope="module")
def expected(words, documents):
    with mt.Index.open(documents, read_only=True) as index:
        return Local(words, index).search(TEXTS[0], 3, where={"section": "games"})


def test_langchain(source, unit, expected):
    langchain = framework("langchain", "langchain_core")
    embeddings = langchain.MatryoEmbeddings(source, width=16)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), unit, atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embeddings.aembed_query(TEXTS[1])), unit[1], atol=1e-6)
    retriever = langchain.MatryoRetriever(source=source, k=3, where={"section": "games"})
    found = retriever.invoke(TEXTS[0])
    assert [one.id for one in found] == expected.ids[0]
    assert [one.page_content for one in found] == expected.documents[0]
    assert [one.metadata["section"] for one in found] == ["games"] * 3
    np.testing.assert_allclose([one.metadata["score"] for one in found], expected.scores[0], atol=1e-6)
    assert len(asyncio.run(retriever.ainvoke(TEXTS[0], k=2))) == 2
    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]


def test_llamaindex(source, unit, expected):
    llamaindex = framework("llamaindex", "llama_index.core")
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import TextNode

    embedding = llamaindex.MatryoEmbedding(source, width=16)
    assert isinstance(embedding, BaseEmbedding)
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), unit, atol=1e-6)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[1]), unit[1], atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)), unit, atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embedding.aget_query_embedding(TEXTS[0])), unit[0], atol=1e-6)
    assert embedding.to_payload()["class_name"] == "MatryoEmbedding"
    retriever = llamaindex.MatryoRetriever(source, k=3, where={"section": "games"})
    assert isinstance(retriever, BaseRetriever)
    for found in (retriever.retrieve(TEXTS[0]), asyncio.run(retriever.aretrieve(TEXTS[0]))):
        assert [one.node.node_id for one in found] == expected.ids[0]
        assert [one.text for one in found] == expected.documents[0]
        assert [one.metadata["section"] for one in found] == ["games"] * 3
        np.testing.assert_allclose([one.score for one in found], expected.scores[0], atol=1e-6)
    built = VectorStoreIndex([TextNode(text=text, id_=text) for text in TEXTS], embed_model=embedding)
    assert built.as_retriever(similarity_top_k=1).retrieve(TEXTS[1])[0].node.node_id == TEXTS[1]


def test_haystack(source, guarded, unit, expected, monkeypatch):
    haystack = framework("haystack", "haystack")
    from haystack import Document, Pipeline

    server, key = guarded
    monkeypatch.setenv("MATRYO_API_KEY", key)
    where = {"local": source} if isinstance(source, Local) else {"url": server.url}
    texts = haystack.MatryoTextEmbedder(width=16, **where)
    np.testing.assert_allclose(texts.run(text=TEXTS[1])["embedding"], unit[1], atol=1e-6)
    given = [Document(content=TEXTS[0]), Document(content="reading images", meta={"title": "library for"})]
    plain = haystack.MatryoDocumentEmbedder(width=16, **where)
    documents = plain.run(documents=given)["documents"]
    np.testing.assert_allclose(documents[0].embedding, unit[0], atol=1e-6)
    assert [one.id for one in documents] == [one.id for one in given]
    assert given[0].embedding is None
    titled = haystack.MatryoDocumentEmbedder(width=16, meta_fields_to_embed=["title", "year"], **where)
    np.testing.assert_allclose(titled.run(documents=given)["documents"][1].embedding, unit[1], atol=1e-6)
    pipeline = Pipeline()
    pipeline.add_component("search", haystack.MatryoRetriever(top_k=3, **where))
    asked = {"search": {"query": TEXTS[0], "where": {"section": "games"}}}
    if isinstance(source, Local):
        with pytest.raises(InputError, match="cannot be written to a file; give it a url"):
            pipeline.dumps()
    else:
        text = pipeline.dumps()
        assert key not in text
        pipeline = Pipeline.loads(text, allowed_modules=["matryo.clients.haystack"])
        again = haystack.MatryoTextEmbedder.from_dict(texts.to_dict())
        np.testing.assert_allclose(again.run(text=TEXTS[0])["embedding"], unit[0], atol=1e-6)
        again.close()
    found = pipeline.run(asked)["search"]["documents"]
    assert [one.id for one in found] == expected.ids[0]
    assert [one.content for one in found] == expected.documents[0]
    np.testing.assert_allclose([one.score for one in found], expected.scores[0], atol=1e-6)
    for one in (texts, plain, titled, pipeline.get_component("search")):
        one.close()


def test_langchains_class_for_openai(served, unit):
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_openai import OpenAIEmbeddings

    options = {"model": "words", "base_url": f"{served.url}/v1", "api_key": "none", "dimensions": 16}
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), unit, atol=1e-6)

    async def query():
        # Its connections belong to this loop; left open they would be closed from whichever loop runs later.
        async with embeddings.async_client._client:
            return await embeddings.aembed_query(TEXTS[1])

    np.testing.assert_allclose(asyncio.run(query()), unit[1], atol=1e-6)
    embeddings.client._client.close()


def test_llamaindexs_class_for_openai(served, unit):
    pytest.importorskip("llama_index.embeddings.openai_like", reason="llama-index-embeddings-openai-like is missing")
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(
        model_name="words", api_base=f"{served.url}/v1", api_key="none", dimensions=16, reuse_client=True
    )
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), unit, atol=1e-6)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[0]), unit[0], atol=1e-6)
    embedding._get_client().close()


try:
    from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests
    from langchain_tests.unit_tests import EmbeddingsUnitTests
except ImportError:

    @pytest.mark.skip(reason="langchain-tests is not installed")
    def test_langchains_own_tests():
        """Three classes of them."""

else:

    class Waiting:
        """Runs their async tests on asyncio's loop, and hands them what only a running server has."""

        pytestmark = pytest.mark.anyio

        @pytest.fixture
        def anyio_backend(self):
            return "asyncio"

        @pytest.fixture(autouse=True)
        def place(self, source):
            type(self).source = source

    class TestEmbeddingsUnit(Waiting, EmbeddingsUnitTests):
        @property
        def embeddings_class(self):
            return framework("langchain", "langchain_core").MatryoEmbeddings

        @property
        def embedding_model_params(self):
            return {"source": self.source, "width": 16}

        @property
        def init_from_env_params(self):
            return {"MATRYO_URL": "http://localhost:9/v1", "MATRYO_API_KEY": "one"}, {"width": 16}, {"width": 16}

    class TestEmbeddings(Waiting, EmbeddingsIntegrationTests):
        @property
        def embeddings_class(self):
            return framework("langchain", "langchain_core").MatryoEmbeddings

        @property
        def embedding_model_params(self):
            return {"source": self.source, "width": 16}

    class TestRetriever(Waiting, RetrieversIntegrationTests):
        @property
        def retriever_constructor(self):
            return framework("langchain", "langchain_core").MatryoRetriever

        @property
        def retriever_constructor_params(self):
            return {"source": self.source}

        @property
        def retriever_query_example(self):
            return TEXTS[0]
