"""Qdrant's gRPC interface in front of the engine that `qdrant-client` brings: a server to send real requests to.

What is Qdrant's own is not here: codes, graphs, shards, TLS. What is: every request and answer crosses a wire in
Qdrant's messages, keys are checked, and calls can be made to fail.
"""

from concurrent import futures

import grpc
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc as collections_grpc
from qdrant_client.grpc import points_service_pb2_grpc as points_grpc

DONE = wire.PointsOperationResponse(result=wire.UpdateResult(status=wire.UpdateStatus.Completed))


class Guard(grpc.ServerInterceptor):
    """Checks the key, counts calls, and fails those that it was told to, or loses their answers."""

    def __init__(self):
        self.key, self.failing, self.losing, self.calls = None, [], [], []

    def intercept_service(self, continuation, details):
        self.calls.append(details.method.rpartition("/")[2])
        given = dict(details.invocation_metadata).get("api-key")
        if self.key is not None and given != self.key:
            return _abort(grpc.StatusCode.UNAUTHENTICATED, f"Invalid API key or JWT: {given}")
        if self.failing:
            return _abort(*self.failing.pop(0))
        found = continuation(details)
        if self.calls[-1] in self.losing:
            self.losing.remove(self.calls[-1])
            return _lost(found)
        return found


def _lost(handler):
    """Does what it is asked; its answer never arrives."""

    def answer(request, context):
        handler.unary_unary(request, context)
        context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")

    return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


def _abort(code, said):
    return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, said))


class Collections(collections_grpc.CollectionsServicer):
    def __init__(self, engine):
        self.engine = engine

    def CollectionExists(self, request, context):  # noqa: N802
        there = self.engine.collection_exists(request.collection_name)
        return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=there))

    def Create(self, request, context):  # noqa: N802
        self.engine.create_collection(
            request.collection_name, GrpcToRest.convert_vectors_config(request.vectors_config)
        )
        return wire.CollectionOperationResponse(result=True)

    def Update(self, request, context):  # noqa: N802
        diff = GrpcToRest.convert_vectors_config_diff(request.vectors_config)
        self.engine.update_collection(request.collection_name, vectors_config=diff)
        return wire.CollectionOperationResponse(result=True)

    def Delete(self, request, context):  # noqa: N802
        self.engine.delete_collection(request.collection_name)
        return wire.CollectionOperationResponse(result=True)

    def Get(self, request, context):  # noqa: N802
        if not self.engine.collection_exists(request.collection_name):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Collection `{request.collection_name}` doesn't exist!")
        told = self.engine.get_collection(request.collection_name)
        return wire.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(told))


class Points(points_grpc.PointsServicer):
    def __init__(self, engine):
        self.engine = engine

    def Upsert(self, request, context):  # noqa: N802
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        self.engine.upsert(request.collection_name, points)
        return DONE

    def Get(self, request, context):  # noqa: N802
        if not self.engine.collection_exists(request.collection_name):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Collection `{request.collection_name}` doesn't exist!")
        ids = [GrpcToRest.convert_point_id(one) for one in request.ids]
        found = self.engine.retrieve(request.collection_name, ids)
        return wire.GetResponse(result=[RestToGrpc.convert_retrieved_point(one) for one in found])

    def QueryBatch(self, request, context):  # noqa: N802
        asked = [GrpcToRest.convert_query_points(one) for one in request.query_points]
        found = self.engine.query_batch_points(request.collection_name, asked)
        return wire.QueryBatchResponse(
            result=[wire.BatchResult(result=[RestToGrpc.convert_scored_point(p) for p in one.points]) for one in found]
        )

    def Scroll(self, request, context):  # noqa: N802
        offset = GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None
        vectors = GrpcToRest.convert_with_vectors_selector(request.with_vectors)
        where = GrpcToRest.convert_filter(request.filter)
        found, after = self.engine.scroll(
            request.collection_name, where, request.limit, offset=offset, with_vectors=vectors
        )
        return wire.ScrollResponse(
            result=[RestToGrpc.convert_retrieved_point(one) for one in found],
            next_page_offset=None if after is None else wire.PointId(uuid=str(after)),
        )

    def Count(self, request, context):  # noqa: N802
        where = GrpcToRest.convert_filter(request.filter) if request.HasField("filter") else None
        count = self.engine.count(request.collection_name, where, exact=request.exact).count
        return wire.CountResponse(result=wire.CountResult(count=count))

    def Delete(self, request, context):  # noqa: N802
        self.engine.delete(request.collection_name, GrpcToRest.convert_points_selector(request.points))
        return DONE

    def UpdateVectors(self, request, context):  # noqa: N802
        points = [GrpcToRest.convert_point_vectors(one) for one in request.points]
        self.engine.update_vectors(request.collection_name, points)
        return DONE

    def CreateFieldIndex(self, request, context):  # noqa: N802
        return DONE  # the engine behind has none

    def CreateVectorName(self, request, context):  # noqa: N802
        made = models.DenseVectorNameConfig(dense={"size": request.dense_config.size, "distance": "Dot"})
        self.engine.create_vector_name(request.collection_name, request.vector_name, made)
        return DONE


class QdrantWire:
    """A server on a free port of this machine."""

    def __init__(self):
        self.engine, self.guard = QdrantClient(":memory:", force_disable_check_same_thread=True), Guard()
        # One thread: the engine behind it is not made for several.
        self.server = grpc.server(futures.ThreadPoolExecutor(1), interceptors=[self.guard])
        collections_grpc.add_CollectionsServicer_to_server(Collections(self.engine), self.server)
        points_grpc.add_PointsServicer_to_server(Points(self.engine), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def url(self, name: str) -> str:
        return f"qdrant://127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        self.server.stop(0).wait()
        self.engine.close()
