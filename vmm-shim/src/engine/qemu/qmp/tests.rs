use super::*;
use tokio::net::UnixListener;

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

/// A peer that greets, agrees on capabilities and then answers each further line with what `script`
/// makes of it.
async fn peer(script: impl Fn(Value) -> String + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        write.write_all(GREETING.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(text)) = lines.next_line().await {
            let command: Value = serde_json::from_str(&text).unwrap();
            let answer = match command["execute"].as_str() {
                Some("qmp_capabilities") => format!("{{\"return\": {{}}, \"id\": {}}}\n", command["id"]),
                _ => script(command),
            };
            if answer.is_empty() || write.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    (dir, path)
}

#[tokio::test]
async fn answers_refusals_and_events_reach_who_waits() {
    let (_dir, path) = peer(|c| match c["execute"].as_str() {
        Some("query-status") => format!(
            "{{\"event\": \"SHUTDOWN\", \"data\": {{\"reason\": \"x\"}}}}\n\
             {{\"return\": {{\"status\": \"running\"}}, \"id\": {}}}\n",
            c["id"]
        ),
        _ => {
            format!("{{\"error\": {{\"class\": \"E\", \"desc\": \"no such thing\"}}, \"id\": {}}}\n", c["id"])
        }
    })
    .await;
    let (qmp, mut events) = Qmp::connect(&path).await.unwrap();
    assert_eq!(qmp.command("query-status", json!({})).await.unwrap()["status"], "running");
    let event = events.recv().await.unwrap();
    assert_eq!((event.name.as_str(), event.data["reason"].as_str()), ("SHUTDOWN", Some("x")));
    let refused = qmp.command("device_del", json!({"id": "a"})).await.unwrap_err();
    assert_eq!(refused.to_string(), "QEMU refused device_del: no such thing");
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    for garbage in ["not json\n".to_owned(), "{\"half\": \n".to_owned(), "x".repeat(2 << 20)] {
        let (_dir, path) = peer(move |_| garbage.clone()).await;
        let (qmp, _) = Qmp::connect(&path).await.unwrap();
        assert!(matches!(qmp.command("stop", json!({})).await, Err(QmpError::Closed | QmpError::Io(_))));
        qmp.closed().wait_for(|closed| *closed).await.unwrap();
        assert!(matches!(qmp.command("stop", json!({})).await, Err(QmpError::Closed)));
    }
}

#[tokio::test]
async fn a_peer_that_leaves_fails_what_waits() {
    let (_dir, path) = peer(|_| String::new()).await;
    let (qmp, _) = Qmp::connect(&path).await.unwrap();
    assert!(matches!(qmp.command("stop", json!({})).await, Err(QmpError::Closed)));
}
