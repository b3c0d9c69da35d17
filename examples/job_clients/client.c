/* SPDX-License-Identifier: ZPL-2.1
 * Submit a job and watch it: ./client ADDRESS TYPE ARGS [cancel]
 *
 *     cc -o client client.c -lzmq
 *
 * It finds members of the replies as text, to need no library but libzmq; use one for JSON.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

static void *sock;
static char request[65536], reply[1 << 21];

static void fail(const char *text)
{
    fprintf(stderr, "%s\n", text);
    exit(1);
}

/* Send the request; the reply is "[status,payload]". */
static void ask(void)
{
    int size;

    if (zmq_send(sock, request, strlen(request), 0) < 0)
        fail("no connection");
    size = zmq_recv(sock, reply, sizeof reply - 1, 0);
    if (size < 0)
        fail("no reply");
    if (size >= (int)sizeof reply)
        fail("the reply is too long");
    reply[size] = 0;
    if (reply[0] != '[' || reply[1] != '2')
        fail(reply);
}

/* Return the text of a member of the reply. A quote inside of a JSON string has a backslash. */
static const char *member(const char *name)
{
    char key[32];
    const char *found;

    snprintf(key, sizeof key, "\"%s\":", name);
    found = strstr(reply, key);
    if (found == NULL)
        fail(reply);
    return found + strlen(key);
}

/* Make an id here: if the reply is lost, the same message can be sent again. */
static void make_id(char *id)
{
    unsigned char bytes[16];
    FILE *file = fopen("/dev/urandom", "rb");
    int i;

    if (file == NULL || fread(bytes, 1, sizeof bytes, file) != sizeof bytes)
        fail("no random numbers");
    fclose(file);
    for (i = 0; i < 16; i++)
        sprintf(id + 2 * i, "%02x", bytes[i]);
}

int main(int argc, char **argv)
{
    void *context = zmq_ctx_new();
    int timeout = 30000, linger = 0, has_progress, has_ended;
    int is_cancelling = argc == 5 && strcmp(argv[4], "cancel") == 0;
    char id[33];
    long long revision = -1;

    if (argc < 4)
        fail("client ADDRESS TYPE ARGS [cancel]");
    sock = zmq_socket(context, ZMQ_REQ);
    zmq_setsockopt(sock, ZMQ_SNDTIMEO, &timeout, sizeof timeout);
    zmq_setsockopt(sock, ZMQ_RCVTIMEO, &timeout, sizeof timeout);
    zmq_setsockopt(sock, ZMQ_LINGER, &linger, sizeof linger);
    if (zmq_connect(sock, argv[1]) < 0)
        fail("bad address");

    make_id(id);
    snprintf(request, sizeof request, "[\"%s\",%s,{\"id\":\"%s\"}]", argv[2], argv[3], id);
    ask();
    do {
        long long after = revision;

        snprintf(request, sizeof request,
                 "[\"pyams_zmq.job.wait\",{\"id\":\"%s\",\"after\":%lld,\"timeout\":20}]",
                 id, after);
        ask();
        revision = atoll(member("revision"));
        has_ended = strncmp(member("ended"), "null", 4) != 0;
        has_progress = strncmp(member("progress"), "null", 4) != 0;
        if (revision != after) {
            const char *state = member("state") + 1;
            const char *done = has_progress ? member("done") : "";

            printf("%.*s %.*s\n", (int)strcspn(state, "\""), state, (int)strcspn(done, ","), done);
            fflush(stdout);
        }
        if (is_cancelling && !has_ended && has_progress) {
            is_cancelling = 0;
            snprintf(request, sizeof request, "[\"pyams_zmq.job.cancel\",{\"id\":\"%s\"}]", id);
            ask();
        }
    } while (!has_ended);
    printf("%.*s\n", (int)strlen(member("reply")) - 2, member("reply")); /* without "}]" */
    zmq_close(sock);
    zmq_ctx_term(context);
    return 0;
}
