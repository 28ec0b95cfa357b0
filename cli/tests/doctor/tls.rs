//! An encrypted connection to a real stack, and faults of its certificate.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::diagnosis::{Diagnosis, patient};
use crate::stack::{Gateway, Server, Stack};

/// A self-signed certificate.
struct Certificate(TempDir);

impl Certificate {
    /// Creates a certificate for this name, such as `IP:127.0.0.1`.
    fn of(name: &str) -> Self {
        let certificate = Self(tempfile::tempdir().unwrap());
        let config = format!("[req]\ndistinguished_name = dn\n[dn]\n[ext]\nsubjectAltName = {name}\n");
        std::fs::write(certificate.path("config"), config).unwrap();
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
        // Two certificates of one subject would be mistaken for each other.
        openssl.args(["-subj", &format!("/CN={:016x}", fastrand::u64(..))]);
        openssl.args(["-config", "config", "-extensions", "ext", "-keyout", "key", "-out", "certificate"]);
        let made = openssl.current_dir(certificate.0.path()).output().expect("openssl is installed");
        assert!(made.status.success(), "{made:?}");
        certificate
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn acceptor(&self) -> TlsAcceptor {
        let chain = vec![CertificateDer::from_pem_file(self.path("certificate")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(self.path("key")).unwrap();
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Terminates TLS in front of a gateway, until the test's runtime ends. Returns the port.
async fn in_front_of(gateway: &Gateway, certificate: &Certificate) -> u16 {
    let (listener, acceptor) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), certificate.acceptor());
    let port = listener.local_addr().unwrap().port();
    let behind = gateway.url().replace("http://", "");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                // A client that does not trust the certificate closes the connection.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut behind = TcpStream::connect(behind).await.unwrap();
                tokio::io::copy_bidirectional(&mut stream, &mut behind).await.ok();
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_untrusted_certificate_is_named() {
    let stack = tokio::task::spawn_blocking(|| Stack::shared(Server::Postrust)).await.unwrap();
    let gateway = stack.gateway().await;
    let diagnose = async |certificate: &Certificate, trusted: &Certificate| {
        let url = format!("https://127.0.0.1:{}", in_front_of(&gateway, certificate).await);
        let trusted = trusted.path("certificate");
        let settings = [("SUPABASE_URL", &*url), ("SSL_CERT_FILE", trusted.to_str().unwrap())];
        Diagnosis::of(&patient(&gateway, &settings)).await
    };
    let (own, other) = (Certificate::of("IP:127.0.0.1"), Certificate::of("IP:127.0.0.1"));
    let well = diagnose(&own, &own).await;
    well.is_well().says("tls", "ok", &["encrypted", "trusted"]).says("conversation", "ok", &["written in"]);
    gateway.forget();
    let untrusted = diagnose(&own, &other).await;
    untrusted.only_fails("tls", &["certificate", "UnknownIssuer", "known to this machine"]);
    untrusted.says("api", "skipped", &["because tls failed"]);
    let elsewhere = Certificate::of("DNS:elsewhere.example");
    diagnose(&elsewhere, &elsewhere)
        .await
        .only_fails("tls", &["certificate", "not valid for name", "SUPABASE_URL"]);
    assert_eq!(gateway.count(""), 0, "the doctor sends no key to an untrusted server");
}
