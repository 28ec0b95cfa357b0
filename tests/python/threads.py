"""The plan's class over supabase-py, and the same class with the changes for threadkeep.

The numbers of the changes are those in src/guide/side_by_side.md. The program reads calls as lines of JSON from standard
input, and answers each call with one line. Usage: threads.py CLASS URL KEY
"""

import json
import sys
from datetime import datetime, timedelta, timezone

from postgrest import APIError
from supabase import create_client


# The number of attempts of an append. An attempt fails if another client writes between its read and its write.
MAX_ATTEMPTS = 100


def after(seconds=0.0):
    """Returns the time after this number of seconds, in PostgREST's format."""
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


class PlannedThreads:
    """Conversations in the plan's table, as the plan has them."""

    def __init__(self, url, key):
        self.client = create_client(url, key)

    @property
    def table(self):
        return self.client.table("conversation_threads")

    def set(self, thread_id, data, ttl, user_id=None):
        """Stores a conversation for `ttl` seconds."""
        row = {"thread_id": thread_id, "conversation_data": data, "expires_at": after(ttl), "accessed_at": after()}
        if user_id is not None:
            row["user_id"] = user_id
        self.table.upsert(row).execute()

    def get(self, thread_id):
        """Returns a conversation, or None. Deletes an expired conversation. Otherwise sets the access time."""
        rows = self.table.select("conversation_data, expires_at").eq("thread_id", thread_id).execute().data
        if rows and datetime.fromisoformat(rows[0]["expires_at"]) <= datetime.now(timezone.utc):
            self.delete(thread_id)
            return None
        return self.accessed(thread_id, rows)

    def accessed(self, thread_id, rows):
        if not rows:
            return None
        self.table.update({"accessed_at": after()}).eq("thread_id", thread_id).execute()
        return rows[0]["conversation_data"]

    def delete(self, thread_id):
        self.table.delete().eq("thread_id", thread_id).execute()

    def delete_expired(self):
        """Deletes all conversations that have expired."""
        rows = self.table.select("thread_id").lt("expires_at", after()).execute().data
        for row in rows:
            self.delete(row["thread_id"])

    def append(self, thread_id, turn, ttl):
        """Adds a turn. Returns False if there is no such conversation."""
        data = self.get(thread_id)
        if data is None:
            return False
        self.set(thread_id, {"messages": data["messages"] + [turn]}, ttl)
        return True

    def of_user(self, user_id):
        """Returns the conversations of a user."""
        rows = self.table.select("thread_id, conversation_data").eq("user_id", user_id).execute().data
        return {row["thread_id"]: row["conversation_data"] for row in rows}


class Threads(PlannedThreads):
    """The plan's class with the changes for threadkeep. Change 1 is the key: the class needs the secret key."""

    def set(self, thread_id, data, ttl, user_id=None):
        row = {"thread_id": thread_id, "conversation_data": data, "expires_at": after(ttl), "accessed_at": after()}
        if user_id is not None:
            row["user_id"] = user_id
        # Change 2. Without `on_conflict`, the upsert only compares `id`. The second write then fails with 23505.
        self.table.upsert(row, on_conflict="thread_id").execute()

    def get(self, thread_id):
        # Change 3. An expired row counts as absent, but stays, because it may be a tombstone.
        live = self.table.select("conversation_data").eq("thread_id", thread_id).gt("expires_at", after())
        return self.accessed(thread_id, live.execute().data)

    def delete_expired(self):
        """Change 3: threadkeep purges expired rows."""

    def of_user(self, user_id):
        live = self.table.select("thread_id, conversation_data").eq("user_id", user_id).gt("expires_at", after())
        return {row["thread_id"]: row["conversation_data"] for row in live.execute().data}

    def append(self, thread_id, turn, ttl):
        # Change 4. Every write changes the version of a row, so a write over another version must read again.
        # The version is a text, because a JavaScript number cannot hold all digits.
        for _ in range(MAX_ATTEMPTS):
            read = self.table.select("conversation_data, version::text")
            rows = read.eq("thread_id", thread_id).gt("expires_at", after()).execute().data
            if not rows:
                return False
            data = {"messages": rows[0]["conversation_data"]["messages"] + [turn]}
            row = {"conversation_data": data, "expires_at": after(ttl), "accessed_at": after()}
            unchanged = self.table.update(row).eq("thread_id", thread_id).eq("version", rows[0]["version"])
            if unchanged.execute().data:
                return True
        raise TimeoutError(f"others wrote {thread_id} between each of {MAX_ATTEMPTS} reads and writes")


def main():
    name, url, key = sys.argv[1:]
    threads = {"planned": PlannedThreads, "changed": Threads}[name](url, key)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"ok": getattr(threads, call["method"])(**call["arguments"])}
        except APIError as error:
            answer = {"error": error.code}
        except Exception as error:  # The test shows what went wrong.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
